const root = document.documentElement;
for (const input of document.querySelectorAll(".viewer input")) {
  const tile = input.previousElementSibling;
  const show = () => { tile.style.backgroundPositionX = `${(100 * input.value) / Math.max(1, tile.dataset.tiles - 1)}%`; };
  input.addEventListener("input", show);
  tile.addEventListener("wheel", (event) => {
    event.preventDefault();
    input.value = Number(input.value) + Math.sign(event.deltaY);
    show();
  }, { passive: false });
  show();
}
for (const button of document.querySelectorAll(".windows button")) {
  button.addEventListener("click", () => { root.dataset.window = button.dataset.window; });
}
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
