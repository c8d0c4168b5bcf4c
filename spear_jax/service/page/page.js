// The page of one person: a queue of answers to judge, and a chat with the model.
// What models and people wrote enters the document as text alone (textContent), never as HTML.

const $ = (id) => document.getElementById(id);
const csrf = document.querySelector('meta[name="csrf"]').content;
const sleep = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

function make(tag, { text, ...attributes } = {}, ...children) {
  const svg = ["svg", "title", "desc", "g", "line", "path", "circle", "text"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  node.append(...children);
  return node;
}

function put(id, text) { // Writes only what is new, and shows a part only while it has text.
  if ($(id).textContent !== text) $(id).textContent = text;
  $(id).hidden = text === "";
}

function announce(text) { // The same words twice are read twice.
  $("live").textContent = $("live").textContent === text ? text + "\u00a0" : text;
}

// ---------------------------------------------------------------- the service

class Refused extends Error { // The service said no, or what must not be sent twice did not get through.
  constructor(status, message) { super(message); this.status = status; }
}

let clock = 0; // Seconds that the service's clock is ahead of this one.
const now = () => Date.now() / 1000 + clock;

async function once(method, path, body) {
  const headers = { "X-CSRF-Token": csrf };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const reply = await fetch("api" + path, {
    method, headers, body: body && JSON.stringify(body), cache: "no-store", signal: AbortSignal.timeout(60_000),
  });
  const text = await reply.text();
  const data = reply.headers.get("Content-Type")?.includes("json") ? JSON.parse(text) : null;
  const date = Date.parse(reply.headers.get("Date"));
  if (date) clock = (date - Date.now()) / 1000 + 1; // It comes in whole seconds, rounded down.
  if (reply.ok) return data;
  if ([502, 503, 504].includes(reply.status) && !data) throw new Error("a proxy without its service");
  throw new Refused(reply.status, data?.error ?? `The service answered with status ${reply.status}.`);
}

// Calls the service until it answers. With again=false a call goes out once: sent twice it would do two things.
async function api(method, path, { body, again = true } = {}) {
  for (let wait = 1; ; wait = Math.min(2 * wait, 15)) {
    try {
      const data = await once(method, path, body);
      put("banner", "");
      return data;
    } catch (error) {
      const lost = !(error instanceof Refused);
      if (error.status === 401) put("banner", "Your session has ended. Open the link that you were given again.");
      else put("banner", lost ? "The service cannot be reached; trying again." : "");
      if (!again && lost) throw new Refused(0, "The service cannot be reached, so this may not have been sent. Try again.");
      if (!lost && !(again && error.status === 429)) throw error;
      await sleep(wait);
    }
  }
}

function complain(error) {
  if (!(error instanceof Refused)) return reportError(error);
  put("problem", error.status === 401 ? "" : error.message);
}

// ---------------------------------------------------------------- the state of the round

const phases = { asking: "People answer", training: "The model trains", done: "Round done" };
const ended = (run) => run.phase === "done" && run.round >= run.rounds;
let state = null;

function minutes(seconds) { // 1:05, and 2:01:05 with hours.
  const left = Math.max(0, Math.ceil(seconds));
  const parts = [Math.floor(left / 3600), Math.floor(left / 60) % 60, left % 60];
  if (!parts[0]) parts.shift();
  return parts.map((part, i) => (i ? String(part).padStart(2, "0") : part)).join(":");
}

const percent = (share) => `${+(100 * share).toFixed(1)} %`;

function showState(next) {
  const before = state;
  state = next;
  const all = next.answered + next.waiting + next.leased;
  put("run", next.run ?? "No run yet");
  put("task", next.task ? ` · ${next.task}` : "");
  put("round", next.round ? `Round ${next.round} of ${next.rounds}` : "Before the first round");
  put("phase", ended(next) ? "Run done" : next.round ? phases[next.phase] ?? next.phase ?? "" : "");
  put("adapter", next.adapter ? `Model: ${next.adapter}` : "");
  put("counts", all ? `${next.answered} of ${all} answered · ${next.mine} by you` : "Nothing to answer yet");
  $("progress").max = all || 1;
  $("progress").value = next.answered;
  const soon = "The next question comes by itself.";
  put("idle-text", ended(next) ? "The last round is over. Thank you." : {
    asking: `Others still answer, or the model writes. ${soon}`,
    training: `The model trains on what people said. ${soon}`,
    done: `The round is over. ${soon}`,
  }[next.round && next.phase] ?? "The training has not begun. The first question comes by itself.");
  put("chat-note", ended(next) ? "The run is over: the model answers no more." : next.round ? ""
    : "The model is busy. It answers when the first round begins.");
  $("idle-dots").hidden = ended(next);
  document.title = next.waiting && document.hidden ? `(${next.waiting}) Teach the model` : "Teach the model";
  showResults(next);
  if (!before || before.run !== next.run) return;
  const news = [];
  if (next.round && (next.phase !== before.phase || next.round !== before.round)) news.push(`Round ${next.round}: ${$("phase").textContent}.`);
  if (next.curve.length > before.curve.length) {
    const [round, accuracy] = next.curve.at(-1);
    news.push(`Accuracy after round ${round}: ${percent(accuracy)}.`);
  }
  if (news.length) announce(news.join(" "));
}

async function follow() {
  for (let run = null; ;) {
    const began = Date.now();
    try {
      const next = await api("GET", state ? `/status?wait=20&seen=${state.version}` : "/status");
      showState(next);
      if (run !== next.run) await showExamples(next);
      run = next.run;
      if (!document.hidden && lease?.run !== next.run) await take(); // A page that nobody sees holds nothing.
    } catch (error) {
      if (error.status === 401) return;
      complain(error);
      await sleep(5);
    }
    if (Date.now() - began < 1000) await sleep(1); // Many small changes are one.
  }
}

function tick() {
  put("deadline", state?.deadline && state.phase === "asking" ? `${minutes(state.deadline - now())} left` : "");
  if (!lease) return;
  const over = state && (state.round > lease.round || (state.round === lease.round && state.phase !== "asking"));
  put("lease", `${over ? "The round is over. " : ""}Yours for ${minutes(lease.expires - now())}`);
  if (lease.expires < now() && !busy && !document.hidden) take().catch(complain);
}

// ---------------------------------------------------------------- the queue

let lease = null; // The request that this person holds.
let busy = false; // Something is on its way to the service.
let taking = null; // The call for the next request, where one is under way.
let calm = 0; // Keys are deaf until then: the card has changed by itself.
let last = null; // The last answer, to fill the hint again after an undo.

function take() {
  taking ??= api("POST", "/lease").then(showRequest).finally(() => { taking = null; });
  return taking;
}

function showRequest(request) {
  const before = lease;
  lease = request;
  $("card").hidden = $("skip").hidden = !request;
  $("idle").hidden = Boolean(request);
  const here = !$("queue").hidden && !$("keys").open;
  if (!request) {
    if (before && here) $("idle-title").focus();
    return;
  }
  tick();
  if (before?.id === request.id && before.run === request.run) {
    if (busy) announce("This question comes again: no other is left for you.");
    return;
  }
  const hints = request.asks === "hint";
  put("card-title", hints ? "What would help the model?" : "Is this answer right?");
  put("answer-title", request.attempt ? `The model's answer, attempt ${request.attempt + 1}` : "The model's answer");
  put("question", request.question);
  $("answer").textContent = request.answer || "(The model said nothing.)";
  $("right-answer").textContent = request.right ?? "";
  $("right-part").hidden = request.right == null;
  put("hint-label", hints ? "Your hint" : "Your hint (optional)");
  put("hint-help", hints ? "The answer is known to be wrong. Say in a few words what would help." : "A hint goes with Wrong. It helps the model to try again.");
  $("verdict-choices").hidden = hints;
  $("hint-choices").hidden = !hints;
  if (before && !busy) { // The lease ran out: what was typed belongs to the question that is gone.
    calm = Date.now() + 700;
    put("problem", "Your time for the last question ran out. Here is another one.");
  }
  const again = last?.id === request.id && last.run === request.run;
  $("hint").value = again ? last.hint ?? "" : "";
  announce(`New question: ${request.question}`);
  const typing = document.activeElement?.matches("textarea, select") && document.activeElement.id !== "hint";
  if (here && !typing) {
    $("card-title").focus({ preventScroll: true });
    if ($("card").getBoundingClientRect().top < 0) $("card").scrollIntoView();
  }
}

// Sends one thing about the queue, then shows the next request.
async function act(method, path, options) {
  if (busy) return;
  busy = true;
  $("card").setAttribute("aria-busy", "true");
  put("problem", "");
  let over = true; // Also after an error that says that the request is no longer ours.
  try {
    await api(method, path, options);
  } catch (error) {
    complain(error);
    over = [403, 404, 409].includes(error.status);
  }
  await taking?.catch(() => {});
  if (over) await take().catch(complain);
  busy = false;
  $("card").removeAttribute("aria-busy");
}

function answer(verdict, hint) {
  if (!lease || busy) return;
  last = { run: lease.run, id: lease.id, hint };
  act("PUT", `/answers/${encodeURIComponent(lease.id)}`, { body: { verdict, hint } });
}

function typed(field = $("hint")) { return field.value.trim() || null; }

const moves = {
  right() {
    if (lease?.asks === "hint") return;
    if (typed()) put("problem", "A hint goes with Wrong. Empty the hint to send Right.");
    else answer("right", null);
  },
  wrong() { if (lease?.asks !== "hint") answer("wrong", typed()); },
  send() {
    if (lease?.asks !== "hint") moves.wrong();
    else if (typed()) answer(null, typed());
    else put("problem", "The hint is empty. Write one, or press Nothing to say.");
  },
  nothing() {
    if (lease?.asks !== "hint") return;
    if (typed()) put("problem", "There is a hint. Send it, or empty it to say nothing.");
    else answer(null, null);
  },
  skip() { if (lease) act("POST", `/requests/${encodeURIComponent(lease.id)}/skip`); },
  undo() { act("POST", "/undo"); }, // Sent twice, it still takes back one.
  hint() { if (lease) $("hint").focus(); },
  help() { $("keys").showModal(); },
};
const keys = { r: "right", w: "wrong", h: "hint", n: "nothing", s: "skip", u: "undo", "?": "help" };

function onKey(event) {
  const inText = event.target.matches("textarea, select, input");
  if (event.key === "Escape" && inText && !$("keys").open) {
    const place = $("queue").hidden ? $("tab-chat") : $("card-title");
    return place.focus();
  }
  const move = keys[event.key.toLowerCase()];
  if (!move || inText || $("queue").hidden || $("keys").open || !$("keys-on").checked) return;
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || Date.now() < calm) return;
  event.preventDefault();
  moves[move]();
}

// Enter sends, Shift+Enter is a new line, and Enter that ends a composed character is neither.
function onEnter(field, send) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!event.repeat) send();
  });
}

// ---------------------------------------------------------------- the chat

const chats = JSON.parse(sessionStorage.getItem("chats") ?? "[]"); // The ids, so that a reload keeps the history.

async function showExamples({ examples = [] }) {
  $("examples-part").hidden = !examples.length;
  $("examples").replaceChildren(make("option", { value: "", text: "Choose a question" }));
  for (const text of examples) $("examples").append(make("option", { value: text, text: text.replace(/\s+/g, " ").slice(0, 120) }));
}

async function ask() {
  const question = typed($("chat-question"));
  if (busy) return;
  if (!question) return put("problem", "The question is empty. Write one, or take an example.");
  busy = true;
  put("problem", "");
  try {
    const { id } = await api("POST", "/chats", { body: { question }, again: false });
    $("chat-question").value = $("examples").value = "";
    sessionStorage.setItem("chats", JSON.stringify(chats.concat(id).slice(-20)));
    chats.push(id);
    openChat(id, { id, question, answer: null }, true);
  } catch (error) { complain(error); } finally { busy = false; }
}

async function openChat(id, chat, fresh) {
  const item = make("li", { class: "card", tabindex: "-1" });
  $("history").append(item);
  $("chat-empty").hidden = true;
  if (chat) drawChat(item, chat);
  if (fresh) item.scrollIntoView({ block: "nearest" });
  await followChat(item, id, chat);
}

// Draws a chat whenever it changes, until nothing of it is awaited any more.
async function followChat(item, id, shown) {
  try {
    for (let seen = JSON.stringify(shown), waits = true; waits;) {
      const began = Date.now();
      const chat = await api("GET", `/chats/${encodeURIComponent(id)}${shown ? "?wait=20" : ""}`);
      if (JSON.stringify(chat) !== seen) {
        if (shown) announceChat(chat);
        drawChat(item, chat);
      }
      [seen, shown] = [JSON.stringify(chat), chat];
      waits = awaited(chat);
      if (waits && Date.now() - began < 500) await sleep(0.5);
    }
  } catch (error) {
    if (shown || ![403, 404].includes(error.status)) return complain(error);
    item.remove(); // A chat of an earlier service, or of somebody who used this tab before.
    $("chat-empty").hidden = $("history").childElementCount > 0;
  }
}

function awaited(chat) {
  if (chat.error) return false;
  return chat.answer == null || (chat.verdict === "wrong" && Boolean(chat.hint) && chat.revision?.answer == null);
}

function announceChat(chat) {
  if (chat.error) announce(`The model could not answer: ${chat.error}`);
  else if (chat.revision?.answer != null && !chat.revision.verdict) announce(`The model's new answer: ${chat.revision.answer}`);
  else if (chat.answer != null && !chat.verdict) announce(`The model's answer: ${chat.answer}`);
}

function drawChat(item, chat) {
  item.replaceChildren(make("h3", { text: "You asked" }), make("p", { class: "text question", text: chat.question }));
  if (chat.answer != null) drawAnswer(item, chat, chat, "The model's answer", false);
  if (chat.revision?.answer != null) drawAnswer(item, chat, chat.revision, "Its answer after your hint", true);
  if (chat.error) item.append(make("p", { class: "said is-wrong", text: `The model could not answer: ${chat.error}` }));
  else if (awaited(chat)) {
    const dots = make("span", { class: "dots", "aria-hidden": "true" }, make("i"), make("i"), make("i"));
    item.append(make("p", { class: "said muted" }, dots, chat.answer == null ? " The model answers." : " The model tries again."));
  }
}

function drawAnswer(item, chat, part, title, revision) {
  const name = part.adapter ? `${title} (${part.adapter})` : title;
  item.append(make("h3", { text: name }), make("p", { class: "text answer", text: part.answer || "(The model said nothing.)" }));
  if (part.verdict) {
    const hint = part.hint ? ` Hint: ${part.hint}` : "";
    const said = part.verdict === "right" ? "✓ You said: right." : `✗ You said: wrong.${hint}`;
    item.append(make("p", { class: `said is-${part.verdict}`, text: said }));
    return;
  }
  const field = make("textarea", { id: `hint-${chat.id}`, rows: "2", maxlength: "500", enterkeyhint: "send" });
  if (!revision) item.append(make("label", { for: field.id, text: "Your hint (optional; with Wrong, the model tries again)" }), field);
  const judge = (verdict) => judgeChat(item, chat, { verdict, hint: revision ? null : typed(field), revision });
  const button = (verdict, sign, text) => {
    const node = make("button", { type: "button", class: `choice ${verdict}` }, make("span", { "aria-hidden": "true", text: sign }), ` ${text}`);
    node.addEventListener("click", () => judge(verdict));
    return node;
  };
  item.append(make("div", { class: "choices" }, button("right", "✓", "Right"), button("wrong", "✗", "Wrong")));
  onEnter(field, () => judge("wrong"));
}

async function judgeChat(item, chat, body) {
  if (item.ariaBusy === "true") return;
  if (body.verdict === "right" && body.hint) return put("problem", "A hint goes with Wrong. Empty the hint to send Right.");
  item.ariaBusy = "true";
  put("problem", "");
  try {
    await api("PUT", `/chats/${encodeURIComponent(chat.id)}`, { body });
    const part = body.revision ? chat.revision : chat;
    Object.assign(part, { verdict: body.verdict, hint: body.hint });
    drawChat(item, chat);
    item.focus({ preventScroll: true });
    announce(body.hint ? "Sent. The model tries again." : "Sent. Thank you.");
    if (awaited(chat)) followChat(item, chat.id, chat);
  } catch (error) { complain(error); } finally { item.ariaBusy = "false"; }
}

// ---------------------------------------------------------------- what the rounds brought

let drawn = "";

const after = (round) => (round ? `After round ${round}` : "Before the training");

function showResults({ curve, samples, rounds }) {
  const wanted = JSON.stringify([curve, samples, rounds, $("curve").clientWidth]);
  if (wanted === drawn) return;
  $("no-curve").hidden = curve.length > 0;
  $("curve").hidden = !curve.length;
  $("sample").hidden = !samples.length;
  if (curve.length) $("curve").replaceChildren(drawCurve(curve, rounds), curveTable(curve));
  if (samples.length) {
    const [first, newest] = [samples[0], samples.at(-1)];
    const entry = (sample, kind) =>
      make("div", { class: kind }, make("dt", { class: "label", text: after(sample.round) }), make("dd", { class: "text", text: sample.answer || "(The model said nothing.)" }));
    $("sample-question").textContent = newest.question;
    $("sample-answers").replaceChildren(entry(first, "before"), ...(newest === first ? [] : [entry(newest, "after")]));
  }
  drawn = JSON.stringify([curve, samples, rounds, $("curve").clientWidth]);
}

// The curve at the width of its place, so that its words keep their size on a phone.
function drawCurve(curve, rounds) {
  const [width, height, left, bottom, above, pad] = [Math.max($("curve").clientWidth, 240), 230, 46, 40, 42, 16];
  const top = [0.1, 0.25, 0.5, 1].find((limit) => curve.every(([, accuracy]) => accuracy <= limit)) ?? 1;
  const first = Math.min(curve[0][0], 1);
  const end = Math.max(rounds ?? 0, curve.at(-1)[0], first + 1);
  const x = (round) => left + ((round - first) / (end - first)) * (width - left - pad);
  const y = (accuracy) => height - bottom - (accuracy / top) * (height - bottom - above);
  const words = curve.map(([round, accuracy]) => `${after(round)}: ${percent(accuracy)}`).join("; ");
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-labelledby": "curve-title curve-desc" },
    make("title", { id: "curve-title", text: "Accuracy after each round" }), make("desc", { id: "curve-desc", text: words }),
    make("text", { x: 0, y: 14, text: "Accuracy" }));
  for (const share of [0, 0.5, 1]) {
    const at = y(share * top);
    svg.append(make("line", { class: "grid", x1: left, x2: width - pad, y1: at, y2: at }),
      make("text", { x: left - 8, y: at + 4, "text-anchor": "end", text: percent(share * top) }));
  }
  const step = Math.ceil((end - first) / 6);
  for (let round = first; round <= end; round += step) svg.append(make("text", { x: x(round), y: height - bottom + 18, "text-anchor": "middle", text: round }));
  svg.append(make("text", { x: (left + width - pad) / 2, y: height - 4, "text-anchor": "middle", text: "Round" }),
    make("path", { class: "line", d: "M" + curve.map(([round, accuracy]) => `${x(round)} ${y(accuracy)}`).join("L") }));
  for (const [round, accuracy] of curve) svg.append(make("circle", { class: "dot", cx: x(round), cy: y(accuracy), r: 4.5 }));
  const [round, accuracy] = curve.at(-1);
  const anchor = x(round) > width - 60 ? "end" : x(round) < left + 30 ? "start" : "middle";
  svg.append(make("text", { class: "newest", x: x(round), y: y(accuracy) - 11, "text-anchor": anchor, text: percent(accuracy) }));
  return svg;
}

function curveTable(curve) {
  const row = (tag, cells) => make("tr", {}, ...cells.map((text) => make(tag, tag === "th" ? { scope: "col", text } : { text })));
  return make("table", { class: "unseen" }, make("caption", { text: "Accuracy after each round" }),
    make("thead", {}, row("th", ["Round", "Accuracy"])), make("tbody", {}, ...curve.map(([round, share]) => row("td", [round, percent(share)]))));
}

// ---------------------------------------------------------------- the start

function select(tab) {
  for (const other of document.querySelectorAll('[role="tab"]')) {
    other.setAttribute("aria-selected", String(other === tab));
    other.tabIndex = other === tab ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = other !== tab;
  }
  put("problem", "");
}

function onTabKey(event) {
  const tabs = [$("tab-queue"), $("tab-chat")];
  const here = tabs.indexOf(event.target);
  const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: -1 }[event.key];
  if (here < 0 || next === undefined) return;
  event.preventDefault();
  const tab = tabs.at(next % tabs.length);
  select(tab);
  tab.focus();
}

for (const name of ["right", "wrong", "send", "nothing", "skip", "undo", "help"]) $(name).addEventListener("click", moves[name]);
for (const tab of document.querySelectorAll('[role="tab"]')) tab.addEventListener("click", () => select(tab));
document.querySelector('[role="tablist"]').addEventListener("keydown", onTabKey);
document.addEventListener("keydown", onKey);
onEnter($("hint"), moves.send);
onEnter($("chat-question"), ask);
$("form").addEventListener("submit", (event) => event.preventDefault());
$("chat-form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("examples").addEventListener("change", () => { $("chat-question").value = $("examples").value; });
$("keys-on").checked = localStorage.getItem("keys") !== "off";
$("keys-on").addEventListener("change", () => localStorage.setItem("keys", $("keys-on").checked ? "on" : "off"));
new ResizeObserver(() => { if (state) showResults(state); }).observe(document.querySelector(".results"));
document.addEventListener("visibilitychange", () => {
  if (document.hidden || !state) return;
  showState(state);
  if (!lease) take().catch(complain);
});
setInterval(tick, 1000);
for (const id of chats.slice(-20)) openChat(id);
follow();
