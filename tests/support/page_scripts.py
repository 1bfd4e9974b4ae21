"""JavaScript that the tests of the report page run in its browser."""

# The texts of a table's column: (identifier, position).
COLUMN = """
const [table, index] = arguments;
const rows = [...document.querySelectorAll(`#${table} tbody tr`)];
return rows.map((row) => row.cells[index].textContent.trim());
"""

# Whether nothing scrolls sideways but what lies in a frame that the window holds: (width).
FITS = """
const inside = (element) => {
  const box = element.getBoundingClientRect();
  return box.left >= 0 && box.right <= innerWidth && box.width > 0;
};
const scrolls = (frame) => getComputedStyle(frame).overflowX === 'auto';
const framed = (element, frame) =>
  frame && inside(frame) && (inside(element) || scrolls(frame));
const images = [...document.images].every(
  (image) => image.complete && image.naturalWidth > 300 && framed(image, image.closest('.frame')));
const tables = [...document.querySelectorAll('table')].every(
  (table) => framed(table, table.parentElement));
const parts = ['#scatter', '#view', 'nav', 'header', '.tiles'].every(
  (part) => inside(document.querySelector(part)));
const page = innerWidth === arguments[0] && document.scrollingElement.scrollWidth <= innerWidth;
return page && images && tables && parts;
"""

# Changes after which the page no longer fits.
SPOILS = (
    "document.querySelector('main').append(document.querySelector('#table1'))",
    "document.images[0].src = ''",
    """const block = document.createElement('pre');
    block.style = 'width: 800px; height: 9px';
    document.body.append(block)""",
)

# Scrolls Table 1 in its frame; returns how far, and how far its first column moved.
SCROLL_TABLE = """
const frame = document.querySelector('#table1').parentElement;
const name = document.querySelector('#table1 tbody td');
const before = name.getBoundingClientRect().left;
frame.scrollLeft = 100;
return [frame.scrollLeft, name.getBoundingClientRect().left - before];
"""

# Follows a link of the navigation; returns where the section then begins: (identifier).
NAVIGATE = """
const [name, done] = arguments;
document.querySelector(`nav a[href="#${name}"]`).click();
const top = () => done(document.getElementById(name).getBoundingClientRect().top);
requestAnimationFrame(() => requestAnimationFrame(top));
"""
AT_THE_END = "return scrollY + innerHeight >= document.scrollingElement.scrollHeight - 1"

# Types into a search box: (selector, text).
SEARCH = """
const box = document.querySelector(arguments[0]);
box.value = arguments[1];
box.dispatchEvent(new Event('input', { bubbles: true }));
"""

# The open dialog's first record, and the files of all of its records.
DIALOG_RECORD = """
const dialog = document.querySelector('dialog');
return dialog.open && dialog.querySelector('pre').innerText;
"""
DIALOG_FILES = """
const entries = [...document.querySelectorAll('dialog summary')];
return document.querySelector('dialog').open && entries.map((entry) => entry.innerText);
"""

# Our numbers in the section of text without a link to their records.
NUMBERS_WITHOUT_A_LINK = """
const published = /^(FID|IS|P|R)$/;
const bare = [...document.querySelectorAll('#digits td')].filter((cell) => {
  const headings = cell.closest('table').querySelectorAll('thead tr:last-child th');
  const ours = cell.cellIndex > 0 && !published.test(headings[cell.cellIndex].textContent);
  return ours && /[0-9]/.test(cell.textContent) && !cell.querySelector('a.records');
});
return bare.map((cell) => cell.textContent);
"""

LOADED = """
const [navigation] = performance.getEntriesByType('navigation');
return navigation.domContentLoadedEventEnd > 0 && Number(document.body.dataset.ready) > 0;
"""
ALL_TABLES_SORT = """
const count = (selector) => document.querySelectorAll(selector).length;
return count('table.dataTable') === count('table');
"""
NUM_FIGURES = "return document.querySelectorAll('#figures .plot img').length"

# Chooses a view of the scatter: (position).
CHOOSE_VIEW = """
const view = document.getElementById('view');
view.value = arguments[0];
view.dispatchEvent(new Event('change'));
"""

# How many points the scatter's data have, and the left and right edges of its marks.
MARKS = """
const scatter = document.getElementById('scatter');
const boxes = [...scatter.querySelectorAll('.point')].map((mark) => mark.getBoundingClientRect());
const points = scatter.data.reduce((total, trace) => total + trace.x.length, 0);
return [points, boxes.map((box) => [box.left, box.right])];
"""
HOVER_TEXT = "return document.querySelector('#scatter .hoverlayer').textContent"
CLICK_FIRST_POINT = """
const scatter = document.getElementById('scatter');
const point = { customdata: scatter.data[0].customdata[0] };
scatter.emit('plotly_click', { points: [point] });
"""
