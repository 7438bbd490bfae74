// The table of nodes, and the map above it: a square each.

import { button, byId, make, setText, show, since, sync } from "./dom.js";

const NOTHING = "—";

// In the order of how soon somebody should look, and how they are coloured.
const STATUSES = {
  lost: "danger", silent: "danger", offline: "danger", unregistered: "warning", draining: "warning", busy: "active",
  online: "success",
};
const CALM = ["busy", "online"];

const has = (value) => value !== undefined && value !== null;
const share = (part, whole) => (has(part) && whole ? Math.min(1, part / whole) : 0);

const COLUMNS = [
  { key: "id", label: "Node", text: (node) => node.id, sort: (node) => node.id },
  { key: "status", label: "Status", text: (node) => node.status, sort: (node) => [trouble(node), node.id] },
  {
    key: "roles", label: "Roles", text: (node) => (node.roles || []).join(", "),
    sort: (node) => (node.roles || []).join(), dull: ["worker"],
  },
  { key: "zone", label: "Zone", text: (node) => node.zone || NOTHING, sort: (node) => node.zone || "" },
  { key: "serves", label: "Serves", text: (node) => (node.serves || []).join(", "), sort: (node) => (node.serves || []).join() },
  {
    key: "held", label: "Running", number: true, text: (node) => (has(node.held) ? `${node.held} / ${node.slots}` : NOTHING),
    sort: (node) => node.held, fill: (node) => share(node.held, node.slots), title: "Jobs held, of slots",
  },
  { key: "queue", label: "Queue", number: true, text: (node) => number(node.queue), sort: (node) => node.queue },
  {
    key: "in-flight", label: "In flight", number: true, title: "Running and in its queue",
    text: (node) => (has(node.held) ? number(node.held + node.queue) : NOTHING), sort: (node) => node.held + node.queue,
  },
  {
    key: "cpu", label: "CPU", number: true, text: (node) => (has(node.cpu_percent) ? `${node.cpu_percent} %` : NOTHING),
    sort: (node) => node.cpu_percent, fill: (node) => share(node.cpu_percent, 100),
  },
  {
    key: "memory", label: "Memory", number: true, text: (node) => (has(node.memory_mb) ? memory(node.memory_mb) : NOTHING),
    sort: (node) => node.memory_mb,
  },
  {
    key: "success", label: "Success", number: true,
    text: (node) => (has(node.success_rate) ? `${Math.floor(node.success_rate * 100)} %` : NOTHING),
    sort: (node) => node.success_rate, title: "Share of its last jobs that did not fail",
  },
  {
    key: "breaker", label: "Breaker", text: breaker, sort: breaker, dull: ["closed"],
    title: "Open: it did its jobs worse than the others, and gets none",
  },
  { key: "epoch", label: "Epoch", text: (node) => node.epoch || NOTHING, sort: (node) => parseInt(node.epoch, 10) },
];

let nodes = [];
let actions = null;
let sorted = { column: COLUMNS[1], descending: false };

function number(value) {
  return has(value) ? value.toLocaleString() : NOTHING;
}

function memory(mb) {
  return mb < 1024 ? `${mb} MB` : `${(mb / 1024).toFixed(1)} GB`;
}

function breaker(node) {
  if (!has(node.limit)) {
    return NOTHING;
  }
  return { "": "closed", ejected: "open" }[node.limit] ?? node.limit;
}

function trouble(node) {
  const place = Object.keys(STATUSES).indexOf(node.status);
  // Those that come and go between busy and online stay where they are; before them what gets no jobs.
  return CALM.includes(node.status) ? (node.limit ? 90 : 99) : place;
}

function note(node) {
  if (node.status === "silent") {
    return `for ${since(node.silent_s)}`;
  }
  if (node.status === "lost") {
    const { held = 0, listed = 0 } = node.moved || {};
    return `${since(node.lost_s)} ago` + (node.moved ? `; ${held + listed} jobs moved` : "");
  }
  return "";
}

function compare(a, b) {
  const [x, y] = [a, b].map(sorted.column.sort);
  if (Array.isArray(x)) {
    return x[0] - y[0] || byName(x[1], y[1]);
  }
  if (!has(x) || !has(y) || Number.isNaN(x) || Number.isNaN(y)) {
    return Number(!has(x) || Number.isNaN(x)) - Number(!has(y) || Number.isNaN(y));
  }
  return typeof x === "number" ? x - y : byName(x, y);
}

// node2 comes before node10.
const byName = new Intl.Collator(undefined, { numeric: true }).compare;

function chosen() {
  const words = byId("nodes-filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const status = byId("nodes-status").value;
  const found = nodes.filter((node) => {
    const text = [node.id, node.zone || "", ...(node.serves || []), ...(node.roles || [])].join(" ").toLowerCase();
    return words.every((word) => text.includes(word)) && (!status || node.status === status);
  });
  found.sort((a, b) => (sorted.descending ? -1 : 1) * compare(a, b) || byName(a.id, b.id));
  return found;
}

export function renderNodes(found, may) {
  nodes = found;
  byId("nodes").parentElement.classList.toggle("cluster-zoned", nodes.some((node) => node.zone));
  actions = may;
  renderStatuses();
  refresh();
}

function renderStatuses() {
  const select = byId("nodes-status");
  const counts = Object.keys(STATUSES).map((status) => [status, nodes.filter((node) => node.status === status).length]);
  const options = counts.filter(([status, count]) => count || status === select.value);
  const first = [["", nodes.length], ...options];
  sync(select, first, ([status]) => status, ([status]) => Object.assign(make("option"), { value: status }), (option, [status, count]) => {
    setText(option, `${status || "All"} (${count})`);
  });
}

function refresh() {
  const found = chosen();
  setText(byId("nodes-count"), found.length === nodes.length ? `${nodes.length}` : `${found.length} of ${nodes.length}`);
  sync(byId("nodes"), found, (node) => node.id, createRow, updateRow);
  sync(byId("nodes-map"), [...nodes].sort((a, b) => byName(a.id, b.id)), (node) => node.id, createSquare, updateSquare);
  const empty = byId("nodes-empty");
  setText(empty, nodes.length ? "No node matches the filter." : "No node has joined yet.");
  show(empty, found.length === 0);
}

function createRow(node) {
  const row = make("tr");
  for (const column of COLUMNS) {
    const cell = make(column.key === "id" ? "th" : "td", `cluster-cell-${column.key}${column.number ? " cluster-number" : ""}`);
    cell.dataset.label = column.label;
    if (column.key === "id") {
      cell.scope = "row";
      cell.title = node.id;
    }
    if (column.key === "status") {
      cell.append(make("span", "cluster-badge"), make("span", "cluster-note"));
    } else {
      cell.append(make("span", "cluster-value"));
    }
    row.append(cell);
  }
  row.append(make("td", "cluster-actions"));
  return row;
}

function updateRow(row, node) {
  row.dataset.tone = STATUSES[node.status];
  COLUMNS.forEach((column, index) => {
    const cell = row.children[index];
    const text = column.text(node);
    setText(cell.firstElementChild, text);
    cell.classList.toggle("cluster-dull", [NOTHING, ""].includes(text) || Boolean(column.dull?.includes(text)));
    if (column.key === "status") {
      setText(cell.lastElementChild, note(node));
    }
    if (column.fill) {
      cell.style.setProperty("--fill", column.fill(node));
    }
    if (column.key === "breaker") {
      cell.classList.toggle("cluster-warned", Boolean(node.limit));
    }
  });
  updateButton(row.lastElementChild, node);
}

function updateButton(cell, node) {
  const takesJobs = actions && has(node.held) && !node.roles.includes("master") && STATUSES[node.status] !== "danger";
  const verb = takesJobs ? (node.status === "draining" ? "resume" : "drain") : "";
  if (cell.dataset.verb !== verb) {
    cell.dataset.verb = verb;
    cell.replaceChildren(...(verb ? [button(actions[verb], actions, node.id)] : []));
  }
}

function createSquare(node) {
  const square = make("span", "cluster-square");
  square.addEventListener("click", () => {
    const row = [...byId("nodes").children].find((each) => each.dataset.key === node.id);
    row?.scrollIntoView({ block: "center" });
  });
  return square;
}

function updateSquare(square, node) {
  square.dataset.tone = node.limit ? "warning" : STATUSES[node.status];
  const title = `${node.id}: ${node.status} ${note(node)}`.trim();
  if (square.title !== title) {
    square.title = title;
  }
}

function sortBy(column, descending) {
  sorted = { column, descending };
  for (const head of byId("nodes-head").children) {
    const isOurs = head.dataset.column === column.key;
    head.setAttribute("aria-sort", isOurs ? (descending ? "descending" : "ascending") : "none");
  }
  byId("nodes-sort").value = column.key;
  refresh();
}

for (const column of COLUMNS) {
  const head = make("th", column.number ? "cluster-number" : "");
  head.scope = "col";
  head.dataset.column = column.key;
  const sorter = make("button", "cluster-sort", column.label);
  sorter.type = "button";
  sorter.title = column.title || "";
  // Of numbers people look for the largest first.
  sorter.addEventListener("click", () =>
    sortBy(column, sorted.column === column ? !sorted.descending : Boolean(column.number)));
  head.append(sorter);
  byId("nodes-head").append(head);
  byId("nodes-sort").append(Object.assign(make("option", "", `Sort: ${column.label}`), { value: column.key }));
}
byId("nodes-head").append(make("td"));
byId("nodes-filter").addEventListener("input", refresh);
byId("nodes-status").addEventListener("change", refresh);
byId("nodes-sort").addEventListener("change", (event) => {
  const column = COLUMNS.find((each) => each.key === event.target.value);
  sortBy(column, Boolean(column.number));
});
sortBy(sorted.column, false);
