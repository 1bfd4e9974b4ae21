// Tables first, then records, then the scatter: the page answers before its largest part is read.
const text = (id) => document.getElementById(id).textContent;
const bundle = URL.createObjectURL(new Blob([text("datatables")], { type: "text/javascript" }));
const { default: DataTable } = await import(bundle);

const tables = {};
for (const table of document.querySelectorAll("table")) {
  const made = new DataTable(table, {
    paging: false, info: false, autoWidth: false, order: [], orderCellsTop: false,
    layout: { topStart: null, topEnd: "search", bottomStart: null, bottomEnd: null },
  });
  if (table.id) tables[table.id] = made;
}

const tiles = [...document.querySelectorAll(".tiles button")];
for (const tile of tiles) {
  tile.addEventListener("click", () => {
    const chosen = tile.getAttribute("aria-pressed") !== "true";
    for (const other of tiles) other.setAttribute("aria-pressed", String(chosen && other === tile));
    tables["claims-table"].column(3).search(chosen ? tile.dataset.level : "", { exact: chosen }).draw();
  });
}

const records = JSON.parse(text("records"));
const dialog = document.querySelector("dialog");
for (const cell of document.querySelectorAll("td[data-records]")) {
  const link = document.createElement("a");
  link.href = "#" + cell.dataset.records.split(" ")[0];
  link.title = "show the record";
  link.append(...cell.childNodes);
  link.addEventListener("click", (event) => {
    event.preventDefault();
    const names = cell.dataset.records.split(" ");
    dialog.querySelector("h3").textContent = names.length === 1 ? "1 record" : `${names.length} records`;
    dialog.querySelector("pre").textContent = names.map((name) => `results/reference/${name}\n${JSON.stringify(records[name], null, 1)}`).join("\n\n");
    dialog.showModal();
  });
  cell.append(link);
}
document.body.dataset.ready = String(Math.round(performance.now()));

const views = JSON.parse(text("views"));
const chooser = document.getElementById("view");
for (const [index, view] of views.entries()) chooser.add(new Option(view.name, index));
const library = document.createElement("script");
library.textContent = text("plotly");
document.head.append(library);
const draw = () => Plotly.react("scatter", views[chooser.value].data, views[chooser.value].layout, { responsive: true, displayModeBar: false });
chooser.addEventListener("change", draw);
if (views.length) await draw();
document.body.dataset.drawn = String(Math.round(performance.now()));
