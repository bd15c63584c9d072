// Follows /api/loop and draws it. Every value goes in as text, so nothing from a service can become markup.
"use strict";

const PERIOD_MS = 1000;
const SVG = "http://www.w3.org/2000/svg";
// name, title, x, y of the node's left upper corner; nodes are 168 by 84
const NODES = [
  ["producers", "applications", 16, 34], ["ingestion", "ingestion", 246, 34], ["feature", "feature", 476, 34],
  ["training", "training", 706, 34], ["registry", "registry", 936, 34], ["rollout", "rollout controller", 936, 250],
  ["gateway", "inference gateway", 476, 250], ["drift", "drift monitor", 706, 142],
];
// from, to, label, path, label position, fact that shows the edge is alive
const EDGES = [
  ["records", "M184 76H240", 188, 66, ["ingestion", "records"]],
  ["records", "M414 76H470", 420, 66, ["ingestion", "records"]],
  ["sets", "M644 76H700", 656, 66, ["training", "runs"]],
  ["version", "M874 76H930", 882, 66, ["registry", "versions"]],
  ["approved", "M1020 118V244", 1028, 186, ["rollout", "deployments"]],
  ["routes, weights", "M936 306H650", 780, 326, ["rollout", "deployments"]],
  ["features", "M545 118V244", 552, 186, ["feature", "entities"]],
  ["predictions", "M644 276C706 276 734 268 742 234", 652, 262, ["gateway", "predictions"]],
  ["retrain", "M790 142V124", 798, 136, ["drift", "findings"]],
  ["answers", "M476 292H100V124", 200, 282, ["gateway", "predictions"]],
];
let before = {};
const shown = {};

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.map((child) => (child instanceof Node ? child : document.createTextNode(String(child)))));
  return made;
}
function shape(tag, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}
const number = (value) => value.toLocaleString("en");
const decimal = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits));
const short = (digest) => digest.slice(0, 12);
const day = (instant) => instant.slice(0, 16).replace("T", " ").replace(" 00:00", "");
// What is counted, as people say it of one.
const ONE = { records: "record", contracts: "contract", "dead letters": "dead letter", entities: "entity", "messages behind": "message behind",
  runs: "run", versions: "version", models: "model", deployments: "deployment", predictions: "prediction", errors: "error", findings: "finding", outcomes: "outcome" };
const counted = (value, what) => `${number(value)} ${value === 1 ? ONE[what] || what : what}`;
// State is said by a sign too, not by colour alone.
const SIGNS = { succeeded: "✓", failed: "✗", running: "▸", retrying: "↻", skipped: "–", waiting: "·" };

function drawLoop(page) {
  const edges = document.getElementById("edges"), nodes = document.getElementById("nodes");
  if (!edges.childElementCount) {
    for (const [label, path, x, y] of EDGES) {
      edges.append(shape("path", { d: path, class: "edge" }), shape("text", { x, y, class: "label" }, label));
    }
  }
  EDGES.forEach(([, , , , [node, fact]], index) => {
    const now = page.facts[node]?.[fact], was = before[node]?.[fact];
    edges.children[2 * index].classList.toggle("live", was !== undefined && now !== was);
  });
  nodes.replaceChildren(...NODES.map(([name, title, x, y]) => {
    const service = page.services[name];
    const group = shape("g", { class: !service ? "" : service.up ? "up" : "down", id: `node-${name}` });
    group.append(shape("rect", { x, y, width: 168, height: 84, rx: 10 }));
    group.append(shape("text", { x: x + 12, y: y + 25, class: "name" }, title));
    const facts = !service ? ["your producers", "and callers"] : !service.up ? ["down"] :
      Object.entries(page.facts[name]).map(([fact, value]) => counted(value, fact));
    facts.forEach((fact, row) => group.append(shape("text", { x: x + 12, y: y + 44 + 16 * row, class: "fact" }, fact)));
    if (service && !service.up) group.append(shape("title", {}, service.problem));
    return group;
  }));
  before = page.facts;
}

function table(columns, rows, empty) {
  if (!rows.length) return element("p", { class: "empty" }, empty);
  const head = element("tr", {}, ...columns.map(([name, kind]) => element("th", { scope: "col", class: kind || "" }, name)));
  const body = rows.map((row) => element("tr", {}, ...row.map((cell, index) => element("td", { class: columns[index][1] || "" }, cell))));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}
const word = (text, kind = text) => element("span", { class: kind }, text);

function rollout(deployment, figures) {
  const box = element("div", { class: "rollout" });
  const step = deployment.candidate ? ` ${deployment.strategy} step ${deployment.step} of ${deployment.steps}` : "";
  box.append(element("div", { class: "head" }, element("h3", {}, deployment.name), word(deployment.phase, deployment.ready ? "good" : "wait"), word(step, "soft")));
  const bar = element("div", { class: "bar", role: "img", "aria-label": deployment.arms.map((a) => `${a.version} ${a.weight} percent`).join(", ") });
  for (const arm of deployment.arms) {
    if (!arm.weight) continue;
    const servers = arm.servers === 1 ? "1 server" : `${arm.servers} servers`;
    const part = element("span", { class: arm.role, title: `${arm.version}, ${arm.role}, ${servers}` }, `${arm.version}  ${arm.weight} %  (${servers})`);
    part.style.flex = `${arm.weight} 1 0`;
    bar.append(part);
  }
  box.append(bar);
  const copied = deployment.arms.filter((a) => a.copies).map((a) => `${a.version} gets copies of ${a.copies} % of the requests`);
  const previous = !deployment.candidate && deployment.previous ? [`millrace undo ${deployment.name} goes back to ${deployment.previous}`] : [];
  const notes = [...copied, ...(deployment.waiting ? [deployment.waiting] : []), ...previous];
  if (notes.length) box.append(element("p", { class: "soft" }, notes.join(" · ")));
  const rows = figures.map((f) => [f.version, number(f.requests), number(f.errors), decimal(f.p99_ms, 1), number(f.outcomes), decimal(f.accuracy)]);
  const gates = deployment.gates.map((g) => [g.gate, word(g.verdict), g.evidence]);
  const events = deployment.events.slice(0, 8).map((e) => [e.at.slice(11, 19), word(e.reason, e.type), e.message]);
  const results = deployment.comparisons.map((c) => [c.segment ? `${c.metric} of ${c.segment}` : c.metric, decimal(c.candidate), decimal(c.stable), `${decimal(c.lower)} to ${decimal(c.upper)}`, element("span", { class: c.better, title: c.evidence }, c.better)]);
  const compared = results.length ? [table([["metric"], ["candidate", "number"], ["stable", "number"], ["difference"], ["better"]], results, ""), element("p", {})] : [];
  const left = element("div", {}, table([["gate"], ["verdict"], ["evidence"]], gates, "no gate is being weighed"), element("p", {}), ...compared,
    table([["version"], ["requests", "number"], ["errors", "number"], ["p99 ms", "number"], ["outcomes", "number"], ["accuracy", "number"]], rows, "no requests yet"));
  box.append(element("div", { class: "split" }, left, element("div", { class: "scroll" }, table([["time"], ["event"], ["what"]], events, "no events"))));
  return box;
}

function draw(page) {
  drawLoop(page);
  const place = (id, ...made) => {
    // Left alone while nothing changes, so that a selection or a screen reader is not thrown out every second.
    const home = document.getElementById(id), fresh = made.map((part) => part.outerHTML).join("");
    if (shown[id] !== fresh) home.replaceChildren(...made);
    shown[id] = fresh;
  };
  const none = element("p", { class: "empty" }, "nothing is deployed; millrace apply -f manifest.yaml");
  place("rollouts", ...(page.deployments.length ? page.deployments.map((d) => rollout(d, page.figures.filter((f) => f.model === d.name || page.deployments.length === 1))) : [none]));
  place("versions", table([["model"], ["version"], ["stage"], ["weight", "number"], ["metrics"], ["rollouts"], ["digest"]], page.versions.map((v) => [
    v.model, v.version, v.stage, v.weight ? `${v.weight} %` : "–",
    Object.entries(v.metrics).slice(0, 4).map(([name, value]) => `${name} ${decimal(value)}`).join(", "),
    element("span", {}, ...v.rollouts.flatMap((r) => [`${r.decision} ${day(r.ended)}, evidence `, element("code", { title: r.evidence }, short(r.evidence)), " "])), element("code", {}, short(v.digest)),
  ]), "no versions yet"));
  place("findings", table([["kind"], ["version"], ["feature"], ["test"], ["effect", "number"], ["counts from", "number"], ["p", "number"], ["window from"], ["what"]], page.findings.map((f) => [
    word(f.kind, "bad"), f.version, f.feature || "–", f.test, decimal(f.effect), decimal(f.threshold), f.p === null ? "–" : f.p.toExponential(1), word(day(f.window[0]), "number"), word(f.summary, "what"),
  ]), "no drift found"));
  place("runs", table([["run"], ["state"], ["version"], ["stages"], ["cause"]], page.runs.map((r) => [
    element("code", {}, r.id.slice(-8)), word(r.state), r.version || "–",
    element("span", {}, ...r.stages.flatMap((s) => [word(`${SIGNS[s.state] || ""} ${s.name}${s.attempts > 1 ? ` ×${s.attempts}` : ""}`, `stage ${s.state}`), " "])), r.cause || "–",
  ]), "no runs yet"));
  place("streams", table([["contract"], ["records", "number"], ["behind", "number"], ["newest event"]], page.streams.map((s) => [
    s.contract, number(s.records), s.behind ? word(number(s.behind), "wait") : "0", day(s.watermark) || "–",
  ]), "no definitions are applied"));
  place("consistency", table([["feature"], ["values", "number"], ["differ", "number"], ["mismatch", "number"], ["missing", "number"], ["extra", "number"], ["example"]], page.consistency.map((c) => [
    c.feature, number(c.compared), word(`${(100 * c.share).toFixed(2)} %`, c.share > 0.01 ? "bad" : c.share ? "wait" : "good"),
    number(c.mismatched), number(c.missing), number(c.extra), c.share ? `served ${decimal(c.served)}, the lake says ${decimal(c.expected)}` : "–",
  ]), "nothing was compared yet"));
  place("letters", table([["contract"], ["reason"], ["records", "number"], ["replayed", "number"]], page.dead_letters.map((l) => [
    l.contract, l.reason, number(l.count), number(l.replayed),
  ]), "no record was refused"));
  const down = Object.entries(page.services).filter(([, service]) => !service.up).map(([name]) => name);
  say(down.length ? `down: ${down.join(", ")}` : "every service answers", down.length);
}

function say(text, isBad) {
  const state = document.getElementById("state");
  if (state.textContent !== text) state.textContent = text;
  state.classList.toggle("bad", Boolean(isBad));
}

async function follow() {
  try {
    const answer = await fetch("/api/loop", { signal: AbortSignal.timeout(10_000) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    draw(await answer.json());
  } catch (error) {
    say(`the console does not answer (${error.message})`, true);
  }
  setTimeout(follow, PERIOD_MS);
}
follow();
