// The cluster page. Whatever the cluster says is shown as text: nothing of it becomes markup.

import { renderCache, renderEvents, renderQuarantine, renderShards } from "./sections.js";
import { byId, setText, show, since } from "./dom.js";
import { renderNodes } from "./nodes.js";

const POLL_MS = 1000;
const ANSWER_MS = 20000;
const OLD_S = 5;

const page = byId("cluster-page");
const base = page.dataset.base;
const readOnly = "readOnly" in page.dataset;

let latest = null;
let takenAt = 0;
let trouble = "";
let busy = false;

function cookie(name) {
  const found = document.cookie.split("; ").find((each) => each.startsWith(`${name}=`));
  return found ? decodeURIComponent(found.slice(name.length + 1)) : "";
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(base + path, {
      cache: "no-store", credentials: "same-origin", signal: AbortSignal.timeout(ANSWER_MS), ...options,
    });
  } catch (error) {
    throw new Error("Flower does not answer.", { cause: error });
  }
  const told = await response.json().catch(() => ({}));
  if (!response.ok) {
    throw new Error(told.error || `Flower answered with ${response.status}: reload the page, and log in again if asked.`);
  }
  return told;
}

async function look() {
  if (busy) {
    return;
  }
  busy = true;
  try {
    latest = await ask("/snapshot");
    takenAt = Date.now();
    trouble = "";
    render();
  } catch (error) {
    trouble = error.message;
  } finally {
    busy = false;
  }
  renderLiveness();
}

function renderLiveness() {
  const age = (Date.now() - takenAt) / 1000;
  const stale = trouble !== "" || !latest || age > OLD_S;
  const outage = byId("cluster-outage");
  show(outage, trouble !== "");
  if (trouble) {
    setText(outage, `${trouble} ${latest ? "What you see is out of date." : ""} The page goes on by itself.`);
  }
  const known = stale ? `As of ${since(age)} ago` : "Live";
  setText(byId("cluster-live"), latest ? known : trouble ? "No data" : "Connecting…");
  byId("cluster-dot").className = `status-dot ${stale ? "status-dot-error" : "status-dot-live"}`;
  page.classList.toggle("cluster-stale", stale);
}

function render() {
  const alive = latest.nodes.filter((node) => node.status === "online" || node.status === "busy");
  const workers = latest.nodes.filter((node) => !(node.roles || []).includes("master"));
  setText(byId("cluster-name"), latest.cluster === "cluster" ? "" : latest.cluster);
  setText(byId("cluster-strategies"), Object.entries(latest.strategies).map(([type, name]) => `${type}: ${name}`).join(" · "));
  setText(byId("metric-nodes"), `${alive.filter((node) => workers.includes(node)).length} / ${workers.length}`);
  setText(byId("metric-in-flight"), latest.in_flight.toLocaleString());
  setText(byId("metric-waiting"), Object.values(latest.waiting).reduce((sum, count) => sum + count, 0).toLocaleString());
  setText(byId("metric-quarantine"), latest.quarantine.count.toLocaleString());
  renderProblems(latest.problems);
  renderNodes(latest.nodes, readOnly ? null : nodeActions);
  renderEvents(latest.events, latest.at);
  renderShards(latest.shards, latest.nodes);
  setText(byId("metric-cache"), renderCache(latest.cache));
  renderQuarantine(latest.quarantine, latest.at, readOnly ? null : jobActions);
}

function renderProblems(problems) {
  const list = byId("cluster-problems");
  const words = problems.join("\n");
  if (list.dataset.words !== words) {
    list.dataset.words = words;
    list.replaceChildren(...problems.map((problem) => Object.assign(document.createElement("li"), { textContent: problem })));
  }
  show(list, problems.length > 0);
}

// What can be done

const nodeActions = {
  drain: {
    label: "Drain",
    text: (id) => `Nothing new is placed on ${id}, and its queue is handed to the other nodes. What it runs goes on.`,
    run: (id) => act(`/nodes/${encodeURIComponent(id)}/drain`, (told) => `${id} drains; jobs handed over: ${told.handed_over}.`),
  },
  resume: {
    label: "Resume",
    text: (id) => `${id} takes jobs again.`,
    run: (id) => act(`/nodes/${encodeURIComponent(id)}/resume`, () => `${id} takes jobs again.`),
  },
  confirm,
};

const jobActions = {
  retry: {
    label: "Retry",
    text: (id) => `Job ${id} is sent again as a new job, without its crashes. It may kill the nodes that run it.`,
    run: (id) => act(`/quarantine/${encodeURIComponent(id)}/retry`, (told) => `${id} is sent again as ${told.sent_as}.`),
  },
  drop: {
    label: "Drop",
    text: (id) => `Job ${id} is forgotten, with its arguments. This cannot be undone.`,
    run: (id) => act(`/quarantine/${encodeURIComponent(id)}/drop`, () => `${id} is dropped.`),
  },
  confirm,
};

function confirm(action, id) {
  const dialog = byId("cluster-dialog");
  setText(byId("dialog-title"), `${action.label} ${id}?`);
  setText(byId("dialog-text"), action.text(id));
  setText(byId("dialog-yes"), action.label);
  dialog.returnValue = "";
  dialog.addEventListener("close", () => dialog.returnValue === "yes" && action.run(id), { once: true });
  dialog.showModal();
}

async function act(path, done) {
  try {
    const told = await ask(path, { method: "POST", headers: { "X-XSRFToken": cookie("_xsrf") } });
    say(done(told), "success");
  } catch (error) {
    say(error.message, "danger");
  }
  await look();
}

function say(words, tone) {
  const said = document.createElement("p");
  said.className = `alert alert-${tone}`;
  said.textContent = words;
  const close = Object.assign(document.createElement("button"), { type: "button", className: "btn-close" });
  close.setAttribute("aria-label", "Close");
  close.addEventListener("click", () => said.remove());
  said.append(close);
  byId("cluster-said").replaceChildren(said);
}

// A page that nobody sees asks nothing, and is up to date when it is seen again.
setInterval(() => document.hidden || look(), POLL_MS);
setInterval(renderLiveness, POLL_MS);
document.addEventListener("visibilitychange", () => document.hidden || look());
look();
