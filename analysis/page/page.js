// Tables come first, then records, then the scatter: the page answers before its largest part is read.
const text = (id) => document.getElementById(id).textContent;
const bundle = URL.createObjectURL(new Blob([text("datatables")], { type: "text/javascript" }));
const { default: DataTable } = await import(bundle);

// On a phone a claim is a card. Its lines need the titles that stand above the columns.
const headings = [...document.querySelectorAll("#claims-table thead tr:last-child th")];
for (const row of document.querySelectorAll("#claims-table tbody tr")) {
  [...row.cells].forEach((cell, index) => (cell.dataset.column = headings[index].textContent));
}

// Every table sorts; those with more than eight rows have a search box.
const tables = {};
for (const table of document.querySelectorAll("table")) {
  const search = table.tBodies[0].rows.length > 8 ? "search" : null;
  const made = new DataTable(table, {
    paging: false, info: false, autoWidth: false, order: [], orderCellsTop: false,
    layout: { topStart: null, topEnd: search, bottomStart: null, bottomEnd: null },
  });
  if (table.id) tables[table.id] = made;
}

// A tile shows only the claims of its level of evidence; a second click shows all again.
const evidence = Number(document.querySelector(".tiles").dataset.column);
const tiles = [...document.querySelectorAll(".tiles button")];
for (const tile of tiles) {
  tile.addEventListener("click", () => {
    const chosen = tile.getAttribute("aria-pressed") !== "true";
    for (const other of tiles) other.setAttribute("aria-pressed", String(chosen && other === tile));
    const level = chosen ? tile.dataset.level : "";
    tables["claims-table"].column(evidence).search(level, { exact: chosen }).draw();
  });
}

// What names records becomes a link that shows them in a dialog.
const records = JSON.parse(text("records"));
const dialog = document.querySelector("dialog");
const amount = (names) => (names.length === 1 ? "1 record" : `${names.length} records`);
const entryOf = (name) => {
  const { file, ...record } = records[name];
  const entry = document.createElement("details");
  const [title, body] = ["summary", "pre"].map((tag) => document.createElement(tag));
  title.textContent = `results/reference/${file}`;
  body.textContent = JSON.stringify(record, null, 1);
  entry.append(title, body);
  return entry;
};
const show = (names) => {
  const entries = names.map(entryOf);
  for (const entry of entries) entry.open = names.length < 4;
  dialog.querySelector("h3").textContent = amount(names);
  dialog.querySelector("div").replaceChildren(...entries);
  dialog.showModal();
};
for (const holder of document.querySelectorAll("[data-records]")) {
  const names = holder.dataset.records.split(" ");
  const link = document.createElement("a");
  link.href = "#" + names[0];
  link.className = "records";
  link.title = "show " + amount(names);
  link.addEventListener("click", (event) => {
    event.preventDefault();
    show(names);
  });

  // A short cell is the link itself; a long one, or a paragraph, ends in a link.
  if (holder.tagName === "TD" && holder.textContent.length < 40) link.append(...holder.childNodes);
  else {
    link.append(amount(names));
    holder.append(" ");
  }
  holder.append(link);
}
document.body.dataset.ready = String(Math.round(performance.now()));

// The scatter and its views.
const views = JSON.parse(text("views"));
const chooser = document.getElementById("view");
for (const [index, view] of views.entries()) chooser.add(new Option(view.name, index));
const library = document.createElement("script");
library.textContent = text("plotly");
document.head.append(library);
const draw = () => {
  const { data, layout } = views[chooser.value];
  return Plotly.react("scatter", data, layout, { responsive: true, displayModeBar: false });
};
chooser.addEventListener("change", draw);
if (views.length) {
  await draw();
  document.getElementById("scatter").on("plotly_click", ({ points: [point] }) => {
    if (point.customdata) show(point.customdata.split(" "));
  });
}
document.body.dataset.drawn = String(Math.round(performance.now()));
