// Tables of class "sortable": a click on a heading sorts, words in a field filter. Without script,
// the page is the same less these two.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows];
  const key = (row, column) => {
    const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent.replaceAll(",", "");
    return text === "–" ? Infinity : text !== "" && !isNaN(text) ? Number(text) : text;
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const down = head.ariaSort === "ascending";
      for (const other of head.parentNode.cells) other.ariaSort = null;
      head.ariaSort = down ? "descending" : "ascending";
      const keyed = rows.map((row) => [key(row, column), row]);
      keyed.sort(([a], [b]) => (typeof a === typeof b ? (a > b) - (a < b) : typeof a === "number" ? -1 : 1));
      if (down) keyed.reverse();
      body.append(...keyed.map(([, row]) => row));
    };
  });
  const field = document.createElement("input"), label = document.createElement("label"), shown = document.createElement("output");
  field.type = "search";
  label.append("Show rows with all of these words ", field, " ", shown);
  label.className = "filter";
  field.oninput = () => {
    const words = field.value.toLowerCase().split(/\s+/);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      count += !row.hidden;
    }
    shown.value = count + " of " + rows.length;
  };
  table.parentNode.before(label);
}
