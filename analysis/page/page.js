// Tables first, then records, then the scatter: the page answers before its largest part is read.
const text = (id) => document.getElementById(id).textContent;
const bundle = URL.createObjectURL(new Blob([text("datatables")], { type: "text/javascript" }));
const { default: DataTable } = await import(bundle);

// On a phone a claim is a card, whose lines need the names that stand above the columns.
const names = [...document.querySelectorAll("#claims-table thead tr:last-child th")].map((heading) => heading.textContent);
for (const row of document.querySelectorAll("#claims-table tbody tr")) [...row.cells].forEach((cell, index) => (cell.dataset.column = names[index]));

const tables = {};
for (const table of document.querySelectorAll("table")) {
  const made = new DataTable(table, {
    paging: false, info: false, autoWidth: false, order: [], orderCellsTop: false,
    layout: { topStart: null, topEnd: table.tBodies[0].rows.length > 8 ? "search" : null, bottomStart: null, bottomEnd: null },
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
const amount = (names) => (names.length === 1 ? "1 record" : `${names.length} records`);
const show = (names) => {
  dialog.querySelector("h3").textContent = amount(names);
  dialog.querySelector("div").replaceChildren(...names.map((name) => {
    const { file, ...record } = records[name];
    const entry = document.createElement("details");
    const [title, body] = ["summary", "pre"].map((tag) => document.createElement(tag));
    title.textContent = `results/reference/${file}`;
    body.textContent = JSON.stringify(record, null, 1);
    entry.append(title, body);
    entry.open = names.length < 4;
    return entry;
  }));
  dialog.showModal();
};
for (const holder of document.querySelectorAll("[data-records]")) {
  const names = holder.dataset.records.split(" ");
  const link = document.createElement("a");
  link.href = "#" + names[0];
  link.className = "records";
  link.title = "show " + amount(names);
  if (holder.tagName === "TD" && holder.textContent.length < 40) link.append(...holder.childNodes);
  else {
    link.append(amount(names));
    holder.append(" ");
  }
  link.addEventListener("click", (event) => {
    event.preventDefault();
    show(names);
  });
  holder.append(link);
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
if (views.length) {
  await draw();
  document.getElementById("scatter").on("plotly_click", ({ points: [point] }) => point.customdata && show(point.customdata.split(" ")));
}
document.body.dataset.drawn = String(Math.round(performance.now()));
