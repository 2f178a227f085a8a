// Boxes that scroll sideways can be reached and scrolled with the keyboard, in every browser; so can a formula longer than its line.
addEventListener("load", async () => {
  await window.MathJax?.startup.promise;
  const edge = document.querySelector("article").getBoundingClientRect().right;
  for (const formula of document.querySelectorAll("article span.math mjx-container"))
    formula.classList.toggle("wide", !formula.closest("table") && formula.getBoundingClientRect().right > edge + 1);
  for (const box of document.querySelectorAll("article :is(pre, .table-wrapper, div.math, mjx-container.wide)"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  document.body.dataset.ready = "";
});
