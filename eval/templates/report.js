"use strict";
// What the page does beyond showing: the viewer of every photo, and tables that sort.

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** A photo's viewer: two of its pictures over or beside each other, under one zoom and one pan. */
class Viewer {
  static MAX_ZOOM = 16;
  static all = [];

  constructor(article) {
    this.name = article.dataset.name;
    this.pictures = new Map([...article.querySelectorAll("img[data-label]")].map((image) => [image.dataset.label, image]));
    const root = document.getElementById("viewer").content.firstElementChild.cloneNode(true);
    const find = (selector) => root.querySelector(selector);
    Object.assign(this, { root, stage: find(".stage"), range: find("input"), output: find("output") });
    this.panes = [...root.querySelectorAll(".pane")];
    this.picks = [find(".pick-left"), find(".pick-right")];
    this.labels = [find(".left"), find(".right")];
    this.zoom = 1;
    this.x = this.y = 0; // where the picture's corner is, in sizes of a pane
    this.pointers = new Map();

    root.style.setProperty("--ratio", article.dataset.width / article.dataset.height);
    this.stage.setAttribute("aria-label", `${this.name}, two pictures to compare; plus and minus zoom, arrow keys pan`);
    this.range.setAttribute("aria-label", `How much of ${this.name} shows the left picture`);
    for (const pane of this.panes) pane.append(new Image());
    for (const pick of this.picks) for (const label of this.pictures.keys()) pick.add(new Option(label, label));
    find(".zoom-in").addEventListener("click", () => this.zoomTo(this.zoom * 2));
    find(".zoom-out").addEventListener("click", () => this.zoomTo(this.zoom / 2));
    find(".reset").addEventListener("click", () => this.zoomTo(1));
    find(".apart").addEventListener("click", () => Viewer.all.forEach((viewer) => viewer.toggleApart()));
    this.picks.forEach((pick, side) =>
      pick.addEventListener("change", () => Viewer.all.forEach((viewer) => viewer.show(side, pick.value))));
    this.range.addEventListener("input", () => this.cut(this.range.valueAsNumber));
    this.listen();
    this.show(0, "Original");
    this.show(1, [...this.pictures.keys()][1]);
    this.cut(50);
    this.move();
    article.querySelector("h3").after(root);
    Viewer.all.push(this);
  }

  /** Show a picture on the left (0) or on the right (1). */
  show(side, label) {
    const picture = this.pictures.get(label);
    if (!picture) return;
    const image = this.panes[side].firstChild;
    image.src = picture.src;
    image.alt = picture.alt;
    this.picks[side].value = label;
    this.labels[side].textContent = label;
  }

  /** Move the border between left and right, in percent. */
  cut(percent) {
    this.range.value = percent;
    this.range.setAttribute("aria-valuetext", `${Math.round(percent)} percent`);
    this.stage.style.setProperty("--cut", `${percent}%`);
  }

  toggleApart() {
    const apart = this.root.classList.toggle("apart");
    this.root.querySelector("button.apart").setAttribute("aria-pressed", apart);
    this.range.disabled = apart;
  }

  /** Zoom so that the point (x, y) of a pane, from 0 to 1, stays where it is. */
  zoomTo(zoom, x = 0.5, y = 0.5) {
    zoom = clamp(zoom, 1, Viewer.MAX_ZOOM);
    this.x = x - ((x - this.x) * zoom) / this.zoom;
    this.y = y - ((y - this.y) * zoom) / this.zoom;
    this.zoom = zoom;
    this.move();
  }

  /** Put both pictures where zoom and pan say: they read the same three variables. */
  move(dx = 0, dy = 0) {
    this.x = clamp(this.x + dx, 1 - this.zoom, 0);
    this.y = clamp(this.y + dy, 1 - this.zoom, 0);
    this.stage.style.setProperty("--x", `${100 * this.x}%`);
    this.stage.style.setProperty("--y", `${100 * this.y}%`);
    this.stage.style.setProperty("--zoom", this.zoom);
    this.root.classList.toggle("zoomed", this.zoom > 1);
    this.root.classList.toggle("pixels", this.zoom >= 4);
    this.output.value = `${+this.zoom.toFixed(1)}×`;
  }

  /** Where an event is in the pane under it, from 0 to 1, and that pane's box. */
  place(event) {
    const boxes = this.panes.map((pane) => pane.getBoundingClientRect());
    const box = boxes.find((one) => event.clientX >= one.left && event.clientX <= one.right) ?? boxes[0];
    return { box, x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  }

  listen() {
    const { stage } = this;
    stage.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      stage.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, event);
      const { box, x } = this.place(event);
      const nearCut = Math.abs(x - this.range.value / 100) * box.width < 24;
      this.cutting = !this.range.disabled && (this.zoom === 1 || nearCut);
      if (this.cutting && event.pointerType !== "touch") this.cut(clamp(100 * x, 0, 100));
    });
    stage.addEventListener("pointermove", (event) => {
      const before = this.pointers.get(event.pointerId);
      if (!before) return;
      const { box, x } = this.place(event);
      const other = [...this.pointers.values()].find((one) => one.pointerId !== event.pointerId);
      this.pointers.set(event.pointerId, event);
      if (other) this.pinch(before, event, other);
      else if (this.cutting) this.cut(clamp(100 * x, 0, 100));
      else this.move((event.clientX - before.clientX) / box.width, (event.clientY - before.clientY) / box.height);
    });
    for (const name of ["pointerup", "pointercancel"])
      stage.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
    stage.addEventListener("dblclick", (event) => {
      const { x, y } = this.place(event);
      this.zoomTo(this.zoom > 1 ? 1 : 4, x, y);
    });
    stage.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // the plain wheel scrolls the page
      event.preventDefault();
      const { x, y } = this.place(event);
      this.zoomTo(this.zoom * Math.exp(-event.deltaY / 300), x, y);
    }, { passive: false });
    stage.addEventListener("keydown", (event) => {
      const actions = {
        "+": () => this.zoomTo(this.zoom * 2), "=": () => this.zoomTo(this.zoom * 2),
        "-": () => this.zoomTo(this.zoom / 2), "0": () => this.zoomTo(1),
        ArrowLeft: () => this.move(0.1, 0), ArrowRight: () => this.move(-0.1, 0),
        ArrowUp: () => this.move(0, 0.1), ArrowDown: () => this.move(0, -0.1),
      };
      const panning = event.key.startsWith("Arrow");
      if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey || (panning && this.zoom === 1)) return;
      event.preventDefault();
      actions[event.key]();
    });
  }

  /** Two fingers: zoom by how their distance changes, and pan with their middle. */
  pinch(before, after, other) {
    const distance = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
    const middle = (one) => this.place({
      clientX: (one.clientX + other.clientX) / 2, clientY: (one.clientY + other.clientY) / 2 });
    const from = middle(before), to = middle(after);
    this.zoomTo((this.zoom * distance(after)) / Math.max(distance(before), 1), from.x, from.y);
    this.move(to.x - from.x, to.y - from.y);
  }
}

/** Make every heading of a table a button that sorts by its column. */
function makeSortable(table) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value.replace("inf", "Infinity"));
  };
  const compare = (a, b) =>
    typeof a === "number" ? (Number.isNaN(a) - Number.isNaN(b)) || (a < b ? -1 : a > b ? 1 : 0)
      : a.localeCompare(b, undefined, { numeric: true });
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of headings) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [key(row, column), row]);
      rows.sort(([a], [b]) => sign * compare(a, b));
      body.append(...rows.map(([, row]) => row));
    });
  });
}

document.documentElement.classList.add("scripted");
document.querySelectorAll("article.photo").forEach((article) => new Viewer(article));
document.querySelectorAll("table.sortable").forEach(makeSortable);
