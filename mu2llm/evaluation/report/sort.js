for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.ariaSort ? head.ariaSort === "ascending" : column > 0;
      const key = (body) => body.rows[0].cells[column].dataset.value ?? body.rows[0].cells[column].textContent.trim();
      const number = (body) => (key(body) === "" || Number.isNaN(Number(key(body))) ? null : Number(key(body)));
      const order = (one, other) => {
        const [a, b] = [number(one), number(other)];
        if (column === 0) return key(one).localeCompare(key(other)) * (down ? -1 : 1);
        if (a === null || b === null) return (a === null) - (b === null); // what is not known is last, always
        return (a - b) * (down ? -1 : 1);
      };
      const before = table.tFoot;
      for (const body of [...table.tBodies].sort(order)) table.insertBefore(body, before);
      for (const each of heads) each.removeAttribute("aria-sort");
      head.ariaSort = down ? "descending" : "ascending";
    });
  });
}
