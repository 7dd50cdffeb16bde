// The page: what the reader does, and what follows.

import { Problem, ask, getModel } from "./api.js";
import { download, keep, messages, restore } from "./conversation.js";
import { readImages } from "./images.js";
import { TurnView, element } from "./view.js";

const at = (id) => document.getElementById(id);
const views = new Map();
let turns = [];
let images = [];
let model = null;
let running = null; // an AbortController while an answer is on its way

function say(problem) {
  at("alert").textContent = problem;
}

function save() {
  keep(turns).catch(() => say("This browser does not store the conversation: it is lost on a reload."));
}

function openSettings(open) {
  at("settings").hidden = !open;
  at("settings-button").setAttribute("aria-expanded", String(open));
}

async function connect() {
  try {
    model = (await getModel(at("api-key").value)).id;
    at("model").textContent = model;
    say("");
  } catch (error) {
    at("model").textContent = "not connected";
    say(error.message);
    if (error.status === 401) openSettings(true);
  }
}

// Turns.

function show() {
  for (const turn of turns) {
    if (!views.has(turn)) views.set(turn, new TurnView(turn, { copy, retry }));
    views.get(turn).update(turn === turns.at(-1) && !running);
  }
  at("turns").replaceChildren(...turns.map((turn) => views.get(turn).root));
  at("empty").hidden = turns.length > 0;
  at("stop").hidden = !running;
  at("send").hidden = Boolean(running);
  at("export").disabled = at("new").disabled = Boolean(running) || !turns.length;
}

function scrollAlong(change) {
  const page = document.documentElement;
  const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 80;
  change();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

async function answer(turn) {
  Object.assign(turn, { answer: "", error: null, note: null, done: false });
  running = new AbortController();
  show();
  document.documentElement.scrollTop = document.documentElement.scrollHeight;
  at("status").textContent = "The model is answering.";
  const started = performance.now();
  try {
    if (!model) await connect();
    if (!model) throw new Problem("The server cannot be reached. Is it running?");
    const body = { model, messages: messages(turns), temperature: at("temperature").valueAsNumber || 0 };
    if (at("max-tokens").value) body.max_tokens = at("max-tokens").valueAsNumber;
    for await (const part of ask(body, at("api-key").value, running.signal)) {
      if (part.text) turn.answer += part.text;
      if (part.reason === "length") turn.cut = true;
      if (part.usage) turn.note = summary(part.usage, (performance.now() - started) / 1000, turn.cut);
      if (part.text) scrollAlong(() => views.get(turn).update(false));
    }
  } catch (error) {
    if (error.name === "AbortError") turn.note = "Stopped.";
    else turn.error = error instanceof Problem ? error.message : "The page failed: reload it and try again.";
    if (error.status === 401) openSettings(true);
    if (!(error instanceof Problem) && error.name !== "AbortError") console.error(error);
  }
  turn.done = true;
  running = null;
  at("status").textContent = turn.error ?? `Answer: ${turn.answer}`;
  scrollAlong(show);
  save();
}

function summary(usage, seconds, cut) {
  const tokens = usage.completion_tokens;
  const rate = (tokens / seconds).toPrecision(3);
  const end = cut ? "; the answer reached the maximum of tokens" : "";
  return `${tokens} tokens in ${seconds.toFixed(2)} s, ${Number(rate)} tokens/s${end}`;
}

function retry(turn) {
  turn.cut = false;
  at("question").focus();
  answer(turn);
}

async function copy(turn) {
  try {
    await navigator.clipboard.writeText(turn.answer);
    at("status").textContent = "Copied.";
    views.get(turn).copyButton.textContent = "Copied";
    setTimeout(() => (views.get(turn).copyButton.textContent = "Copy"), 1500);
  } catch {
    say("The browser does not let this page copy: select the text and copy it.");
  }
}

function send() {
  const question = at("question").value.trim();
  if (running) return;
  if (!question) {
    say("Write a question first.");
    return;
  }
  if (!at("temperature").reportValidity() || !at("max-tokens").reportValidity()) {
    openSettings(true);
    return;
  }
  say("");
  const turn = { question, images, answer: "", done: false };
  turns.push(turn);
  at("question").value = "";
  images = [];
  showImages();
  save();
  answer(turn);
}

// Images of the next question.

function showImages() {
  at("images").replaceChildren(
    ...images.map((image, number) => {
      const remove = element("button", { type: "button", textContent: "×" });
      remove.setAttribute("aria-label", `Remove ${image.name}`);
      remove.onclick = () => {
        images = images.filter((_, other) => other !== number);
        showImages();
        at("question").focus();
      };
      return element("li", {}, element("img", { src: image.url, alt: image.name }), remove);
    }),
  );
}

async function add(files) {
  if (!files.length) return;
  const read = await readImages(files);
  images = [...images, ...read.images];
  showImages();
  say(read.problem);
  at("question").focus();
}

// Events.

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("question").addEventListener("keydown", (event) => {
  // While a Chinese input method is open, Enter belongs to it.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
at("stop").addEventListener("click", () => {
  running?.abort();
  at("question").focus();
});
at("add").addEventListener("click", () => at("files").click());
at("files").addEventListener("change", () => {
  add([...at("files").files]);
  at("files").value = "";
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) {
    event.preventDefault();
    add(files);
  }
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  at("composer").classList.add("target");
});
document.addEventListener("dragleave", () => at("composer").classList.remove("target"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("composer").classList.remove("target");
  const files = [...event.dataTransfer.files];
  if (files.length) add(files);
  else say("Drop an image file here; this was something else.");
});
at("settings-button").addEventListener("click", () => openSettings(at("settings").hidden));
at("new").addEventListener("click", () => {
  if (!confirm("Delete this conversation and begin a new one?")) return;
  turns = [];
  views.clear();
  show();
  save();
  at("question").focus();
});
at("export").addEventListener("click", () => download(turns, model));
for (const id of ["temperature", "max-tokens"]) {
  at(id).value = localStorage.getItem(id) ?? at(id).value;
  at(id).addEventListener("change", () => localStorage.setItem(id, at(id).value));
}
// The key is forgotten with the tab.
at("api-key").value = sessionStorage.getItem("api-key") ?? "";
at("api-key").addEventListener("change", () => {
  sessionStorage.setItem("api-key", at("api-key").value);
  connect();
});

try {
  turns = await restore();
} catch {
  say("This browser does not store the conversation: it is lost on a reload.");
}
show();
at("question").focus();
await connect();
document.body.dataset.ready = "true";
