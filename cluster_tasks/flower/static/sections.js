// Events, quarantine, shards and cache.

import { button, byId, make, setText, show, since, sync } from "./dom.js";

const TONES = {
  "node lost": "danger", "node stuck": "danger", "job quarantined": "danger", "panic guard": "danger",
  "no coordinator": "danger", "breaker open": "danger", "jobs moved": "active", "jobs handed back": "active",
  rebalanced: "active", "node draining": "warning", "node left": "warning", "node joined": "success",
  "node resumed": "success", "node restarted": "success", "breaker closed": "success", "coordinator back": "success",
  "panic guard over": "success",
};

const WORDS = {
  "node lost": (facts) => `${facts.node} was silent for ${Number(facts.silent_s).toFixed(1)} s and is fenced`,
  "node joined": (facts) => `${facts.node}, epoch ${facts.epoch}`,
  "node left": (facts) => `${facts.node}`,
  "node resumed": (facts) => `${facts.node} takes jobs again`,
  "node draining": (facts) => `${facts.node}; ${facts.listed} queued jobs went to others`,
  "jobs moved": (facts) => `${facts.held} running and ${facts.listed} queued of ${facts.node || "nobody"} went to others`,
  "jobs handed back": (facts) => `${facts.held} that ${facts.node} ran went to others`,
  "job quarantined": (facts) => `${facts.task} ${facts.job}: ${facts.reason}`,
};

function describe(event) {
  const words = WORDS[event.kind];
  return words ? words(event.facts) : Object.entries(event.facts).map(([name, fact]) => `${name} ${spell(fact)}`).join(", ");
}

const spell = (fact) => (typeof fact === "string" ? fact : JSON.stringify(fact));

function moment(seconds) {
  const date = new Date(seconds * 1000);
  const time = make("time", "", date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" }));
  time.title = date.toLocaleString();
  time.dateTime = Number.isNaN(date.getTime()) ? "" : date.toISOString();
  return time;
}

function ago(now, seconds) {
  return `${since(now - seconds)} ago`;
}

export function renderEvents(events, now) {
  const list = byId("events");
  const create = (event) => {
    const item = make("li");
    item.dataset.tone = TONES[event.kind] || "";
    const head = make("div", "cluster-event-head");
    head.append(make("span", "cluster-badge", event.kind), moment(event.at), make("span", "cluster-ago"));
    item.append(head, make("p", "", describe(event)));
    return item;
  };
  sync(list, events, (event) => event.id, create, (item, event) => {
    setText(item.querySelector(".cluster-ago"), ago(now, event.at));
  });
  // What was there before somebody came is no news.
  list.setAttribute("aria-live", "polite");
  show(byId("events-empty"), events.length === 0);
}

export function renderQuarantine({ count, jobs }, now, actions) {
  const create = (job) => {
    const row = make("tr");
    const id = make("th");
    id.scope = "row";
    id.append(make("code", "", job.id));
    const when = make("td", "cluster-since");
    when.append(make("span"));
    const buttons = make("td", "cluster-actions");
    if (actions) {
      buttons.append(button(actions.retry, actions, job.id), " ", button(actions.drop, actions, job.id));
    }
    const again = job.retry_of ? ` It was here before as ${job.retry_of}.` : "";
    row.append(id, make("td", "", job.task), when, make("td", "cluster-why", job.reason + again), buttons);
    ["Job", "Task", "Since", "Why"].forEach((label, index) => (row.children[index].dataset.label = label));
    return row;
  };
  sync(byId("quarantine"), jobs, (job) => job.id, create, (row, job) => setText(row.children[2].firstChild, ago(now, job.at)));
  setText(byId("quarantine-count"), count > jobs.length ? `the last ${jobs.length} of ${count}` : count ? `${count}` : "");
  show(byId("quarantine-table"), count > 0);
  show(byId("quarantine-empty"), count === 0);
}

export function renderShards(shards, nodes) {
  const alive = new Set(nodes.filter((node) => !["lost", "silent", "offline"].includes(node.status)).map((node) => node.id));
  const create = ({ collection, shard }) => {
    const row = make("tr");
    const name = make("th", "", `${collection}/${shard}`);
    name.scope = "row";
    row.append(name, make("td"), make("td"));
    ["Shard", "Held by", "State"].forEach((label, index) => (row.children[index].dataset.label = label));
    row.lastElementChild.append(make("span", "cluster-badge"));
    return row;
  };
  sync(byId("shards"), shards, ({ collection, shard }) => `${shard}/${collection}`, create, (row, { holders, ready }) => {
    const asked = ready.filter((id) => alive.has(id));
    setText(row.children[1], holders.map((id) => (asked.includes(id) ? id : `${id} (loading)`)).join(", "));
    row.dataset.tone = asked.length ? "success" : "warning";
    setText(row.lastElementChild.firstElementChild, asked.length ? `${asked.length} ready` : "from storage");
  });
  show(byId("shards-table"), shards.length > 0);
  show(byId("shards-empty"), shards.length === 0);
}

// Return the hit rate of all that was asked for.
export function renderCache(cache) {
  const tiers = cache?.tiers || [];
  const names = { local: "Memory of processes", redis: "Redis" };
  sync(byId("cache"), tiers, (tier) => tier.tier, (tier) => {
    const row = make("tr");
    const name = make("th", "", names[tier.tier]);
    name.scope = "row";
    row.append(name, ...[0, 1, 2, 3].map(() => make("td", "cluster-number")));
    ["Tier", "Hits", "Misses", "Hit rate", "Saved"].forEach((label, index) => (row.children[index].dataset.label = label));
    return row;
  }, (row, tier) => {
    const cells = [tier.hits.toLocaleString(), tier.misses.toLocaleString(), percent(tier.hit_percent), since(tier.saved_s)];
    cells.forEach((text, index) => setText(row.children[index + 1], text));
  });
  show(byId("cache-table"), tiers.length > 0);
  setText(byId("cache-empty"), cache ? cache.error || "" : "There is no cache: CLUSTER_CACHE_URL sets one.");
  show(byId("cache-empty"), tiers.length === 0);
  // What memory does not have is asked of Redis.
  const asked = tiers.length ? tiers[0].hits + tiers[0].misses || tiers[1].hits + tiers[1].misses : 0;
  return asked ? percent((100 * (tiers[0].hits + tiers[1].hits)) / asked) : "—";
}

function percent(value) {
  return value === null ? "—" : `${Math.min(100, Math.round(value))} %`;
}
