"""google.colab.output: what a notebook may call and what, outside a browser, does nothing."""


def clear(*arguments, **options) -> None:
    pass


def enable_custom_widget_manager() -> None:
    pass
