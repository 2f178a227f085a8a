"""`make rehearse-7b` on the tiny Falcon: the same phases in the same processes, in seconds; and what it says when it cannot run."""

import json
import shutil

import pytest
from safetensors import safe_open

from helpers import profiles, random_checkpoint, rehearsal, rehearsal_phases, shapes
from helpers.errors import OutputError, PickledWeightsError

TINY = "data/tiny-falcon"


def test_the_whole_rehearsal_in_the_layout_of_the_hub(tmp_path):
    """Quantize, keep the copy, train, die by SIGKILL, resume, save, reload, answer: the command line itself."""
    arguments = ["--model", TINY, "--layers", "2", "--folder", str(tmp_path), "--layout", "hub"]
    assert rehearsal.main([*arguments, "--phases", "load", "cache_save", "cache_load", "train", "resume", "answer"]) == 0
    (record,) = json.loads((tmp_path / "rehearsal.json").read_text())["layouts"].values()
    phases, summary = record["phases"], record["summary"]
    assert len(record["files"]) == 2 and record["files"][0][1] > record["files"][1][1]
    assert summary["bits_equal_on_every_path"] and summary["linear4bit_modules"] == 8
    assert summary["stored_bytes"] == summary["stored_bytes_predicted"]
    assert phases["train"]["killed_after_checkpoint"] and "losses" not in phases["train"]
    assert (phases["resume"]["steps"], phases["resume"]["resumed_steps"]) == (4, 2)
    assert len(phases["resume"]["losses"]) == 4 and phases["resume"]["base_unchanged"]
    assert isinstance(phases["answer"]["answer"][0], str)
    assert phases["cache_load"]["of_it_quantizing_seconds"] == 0 < phases["load"]["peak_anonymous_bytes"]
    assert [path.name for path in tmp_path.iterdir()] == ["rehearsal.json"], "the disk is left as it was"


def test_pickled_weights_are_refused_measured_and_converted(tmp_path):
    config = shapes.known_config(TINY)
    for layout in ("bin", "hub"):
        assert random_checkpoint.write_checkpoint(tmp_path / layout, config, layout)
    profile = rehearsal_phases.rehearsed(tmp_path / "bin")
    assert "python -m helpers.weights FOLDER`" in rehearsal_phases.refused(profile, tmp_path)["error"]
    with pytest.raises(PickledWeightsError):
        rehearsal_phases.load(profile, tmp_path)
    assert rehearsal_phases.load_pickled(profile, tmp_path)["tensors"] == len(random_checkpoint.tensor_shapes(config))
    rehearsal_phases.convert(profile, tmp_path)
    assert not list((tmp_path / "bin").glob("*.bin"))
    converted = rehearsal_phases.load(profile, tmp_path)["base_sha256"]
    assert converted == rehearsal_phases.load(rehearsal_phases.rehearsed(tmp_path / "hub"), tmp_path)["base_sha256"]
    assert [len(list((tmp_path / layout).glob("*.safetensors"))) for layout in ("bin", "hub")] == [2, 2]


def test_the_checkpoint_has_the_exact_shapes_and_layouts(tmp_path):
    config = shapes.known_config(TINY)
    for layout, least in (("hub", 2), ("shards", 5)):
        folder = tmp_path / layout
        random_checkpoint.write_checkpoint(folder, config, layout)
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) >= least
        found = {}
        for path in files:
            with safe_open(path, framework="pt") as tensors:
                found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
        assert {name: tuple(tensor.shape) for name, tensor in found.items()} == random_checkpoint.tensor_shapes(config)
        assert found["lm_head.weight"].equal(found["transformer.word_embeddings.weight"])
        matrix = found["transformer.h.0.mlp.dense_h_to_4h.weight"].float()
        assert abs(matrix.std() / config.initializer_range - 1) < 0.02 and abs(matrix.mean()) < 1e-3


def test_falcon_7b_is_cut_as_on_the_hub():
    """Two shards of 9.95 and 4.48 GB: computed, not written."""
    config = shapes.known_config(profiles.FALCON_7B)
    assert random_checkpoint.checkpoint_bytes(config) == 14_434_379_520
    groups = random_checkpoint.file_names(config, "hub")
    totals = [sum(bytes_ for _, bytes_ in group) for group in groups.values()]
    assert [round(total / 1e9, 2) for total in totals] == [9.95, 4.48]
    assert list(groups) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert list(random_checkpoint.file_names(config, "bin")) == [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
    ]
    assert len(random_checkpoint.file_names(config, "shards")) >= 15


def test_a_finished_checkpoint_is_used_again_and_a_cut_off_one_is_not(tmp_path):
    config = shapes.known_config(TINY)
    assert random_checkpoint.write_checkpoint(tmp_path / "c", config, "hub")
    assert not random_checkpoint.write_checkpoint(tmp_path / "c", config, "hub")
    assert random_checkpoint.write_checkpoint(tmp_path / "c", config, "shards")
    (tmp_path / "c" / random_checkpoint.DONE).unlink()
    assert random_checkpoint.write_checkpoint(tmp_path / "c", config, "shards")


@pytest.mark.parametrize("layout", ["hub", "bin"])
def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys, layout):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=15 * 10**9))
    assert rehearsal.main(["--folder", str(tmp_path), "--layout", layout]) == 1
    assert "OutputError: the disk of" in (error := capsys.readouterr().err)
    assert "15.0 GB free and the rehearsal takes up to" in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_at_most_30_gb_at_a_time(tmp_path):
    config = shapes.known_config(profiles.FALCON_7B)
    for layout in rehearsal.LAYOUT_PHASES:
        assert 18e9 < rehearsal.disk_needed(config, layout, tmp_path / "none") < 30e9


def test_a_phase_that_fails_ends_the_rehearsal(tmp_path, capfd):
    config = shapes.known_config(TINY)
    random_checkpoint.write_checkpoint(tmp_path / "hub", config, "hub")
    with (tmp_path / "hub" / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert rehearsal.main(["--model", TINY, "--folder", str(tmp_path), "--phases", "load"]) == 1
    assert "ModelError: the phase 'load' of the rehearsal ended with 1, not 0" in capfd.readouterr().err


def test_a_target_that_is_missed_is_told(monkeypatch):
    config = shapes.known_config(TINY)
    good = {
        "load": {"peak_anonymous_bytes": 10**9, "load_seconds": 9, "load_processor_seconds": 12, "base_sha256": "a", "linear4bit_modules": 16, "footprint_bytes": 100, "footprint_expected_bytes": 104},
        "cache_load": {"load_seconds": 3, "load_processor_seconds": 2, "base_sha256": "a", "peak_anonymous_bytes": 1},
        "resume": {"base_unchanged": True, "peak_anonymous_bytes": 2 * 10**9, "peak_rss_bytes": 3 * 10**9},
    }  # fmt: skip
    profile = profiles.PROFILES["cpu-7b"]
    summary = rehearsal.summary(good, config, profile)
    assert summary["within_targets"] and summary["load_over_cache_load_seconds"] == 3
    for phase, key, value in (
        ("load", "footprint_bytes", 98), ("load", "peak_anonymous_bytes", 47 * 10**8), ("load", "linear4bit_modules", 15),
        ("cache_load", "base_sha256", "b"), ("resume", "base_unchanged", False), ("resume", "peak_rss_bytes", 81 * 10**8),
    ):  # fmt: skip
        bad = {name: dict(values) for name, values in good.items()}
        bad[phase][key] = value
        assert not rehearsal.summary(bad, config, profile)["within_targets"], (phase, key)


def test_the_disk_error_is_the_helpers_own(tmp_path):
    with pytest.raises(OutputError, match="GB free and a thing takes up to 1,000,000.0 GB"):
        rehearsal.weights.check_disk(tmp_path / "not" / "there", 10**15, "a thing")
