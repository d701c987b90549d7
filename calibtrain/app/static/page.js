// Whatever the model or a person wrote enters the page by textContent alone.
"use strict";

const at = (id) => document.getElementById(id);
const levels = JSON.parse(at("levels").textContent);
const groups = JSON.parse(at("groups").textContent);
const slider = at("risk");
const picker = at("group");
const run = JSON.parse(at("run").textContent);
const { percent } = answers;
const GIVES = "It gives the claims that it is at least";
const ELSEWHERE = ", as measured on other questions";
let reply = null;
let before = []; // turns of this conversation, where conversations were graded; the last two are on the card
let given = ""; // what the card says: the answer, without what is withheld of it

function level() {
  const chosen = picker ? picker.value : "";
  if (chosen !== "") return groups[Number(chosen)];
  return levels[slider ? Number(slider.value) : 0];
}

function promise(one) {
  if (one.threshold === null) return "It answers nothing.";
  if (one.risk === null) return "It answers everything. How often it is wrong is then not promised.";
  if (one.claims) return `At most ${one.risk} of its replies hold a wrong claim. ${GIVES} ${percent(one.threshold)} sure of.`;
  const often = `At most ${one.risk} of its answers are wrong.`;
  return `${often} It answers about ${percent(one.coverage)} of questions: those it is at least ${percent(one.threshold)} sure of.`;
}

function showPromise() {
  const one = level();
  const text = promise(one);
  at("promise").textContent = text;
  at("scope").textContent = one.promise;
  at("limit").textContent = one.limit;
  at("uncovered").hidden = !(reply && reply.silence);
  if (!slider) return;
  slider.disabled = picker !== null && picker.value !== "";
  slider.setAttribute("aria-valuetext", text);
  document.querySelectorAll(".stops li").forEach((stop, index) => {
    stop.classList.toggle("chosen", !slider.disabled && index === Number(slider.value));
  });
}

// Parts of the answer, each given or withheld: by its own chance where claims are certified, else as the whole is.
function partsAt(one) {
  return reply.parts.map((part) => ({ ...part, kept: !one.claims || part.probability >= one.threshold }));
}

function reason(one, abstained, parts) {
  if (one.threshold === null) return "Nothing is certified here, so I do not answer.";
  if (one.claims && !reply.silence) {
    const kept = `I give ${parts.filter((part) => part.kept).length} of my ${parts.length} claims`;
    return `${kept}: those from ${percent(one.threshold)} on, so that at most ${one.risk} of my replies hold a wrong claim.`;
  }
  const chance = `My best guess has a ${percent(reply.confidence)} chance of being right`;
  if (reply.silence) {
    if (!run.answers_outside) return "I do not answer such questions.";
    const from = one.threshold ? `I answer from ${percent(one.threshold)} on` : "I answer whatever the chance";
    return `${chance}${ELSEWHERE}; ${from}, but how often that is wrong here is not known.`;
  }
  if (one.risk === null) return `${chance}. I answer whatever the chance.`;
  const rule = `I answer from ${percent(one.threshold)} on, so that at most ${one.risk} of my answers are wrong.`;
  return abstained ? `${chance}; ${rule}` : rule;
}

function state(one, abstained, parts) {
  if (one.threshold === null) return "Nothing is certified";
  if (reply.silence && !run.answers_outside) return "Not answered: unlike what was graded";
  if (reply.silence && !abstained) return "Not covered by the certificate";
  if (abstained) return "Not sure enough to answer";
  const withheld = parts.filter((part) => !part.kept).length;
  if (withheld) return `Answered in part: ${withheld} of ${parts.length} withheld`;
  if (one.risk === null) return "Answers everything";
  return "Sure enough to answer";
}

function place(element, share) {
  element.style.setProperty("--at", `${100 * share}%`);
}

function showReply() {
  if (!reply) return;
  const one = level();
  const kept = reply.silence && !run.answers_outside;
  const parts = partsAt(one);
  const sure = one.claims ? parts.some((part) => part.kept) : reply.confidence >= one.threshold;
  const abstained = one.threshold === null || kept || !sure;
  const reservation = reply.silence ? ELSEWHERE : one.reservation;
  at("result").hidden = false;
  document.body.classList.add("answered");
  at("result").classList.toggle("refused", abstained);
  at("result").classList.toggle("silent", reply.silence !== "");
  at("silence").textContent = reply.silence;
  at("silence").hidden = !reply.silence;
  at("asked").textContent = reply.question;
  at("state").textContent = state(one, abstained, parts);
  at("chance").textContent = percent(reply.confidence).replace("less than ", "<").replace("more than ", ">");
  at("answer").replaceChildren(abstained ? reply.refusal : answers.shown(reply.best_guess, parts, false));
  at("answer").classList.toggle("long", !abstained && answers.long(reply.best_guess, parts));
  at("sentence").textContent = abstained ? "" : `${reply.sentence}${reservation}.`;
  at("sentence").hidden = abstained || one.claims; // of claims each has its own
  at("reason").textContent = reason(one, abstained, parts);
  at("gauge").setAttribute("aria-valuenow", (100 * reply.confidence).toFixed(0));
  at("gauge").setAttribute("aria-valuetext", `${percent(reply.confidence)}, ${reply.word}`);
  place(at("fill"), reply.confidence);
  at("measure").hidden = one.threshold === null || one.claims || reply.silence !== ""; // a chance that nothing vouches for is not shown at a glance
  at("mark").hidden = at("mark-label").hidden = one.risk === null;
  if (one.risk !== null) {
    place(at("mark"), one.threshold);
    place(at("mark-label"), Math.min(0.8, Math.max(0.2, one.threshold)));
    at("mark-label").textContent = `answers from ${percent(one.threshold)}`;
  }
  const withheld = parts.some((part) => !part.kept);
  given = abstained ? reply.refusal : withheld ? answers.kept(reply.best_guess, parts) : reply.best_guess;
  at("guess-title").textContent = abstained ? "Show the guess that it keeps back" : "Show what it keeps back";
  at("guess").hidden = !abstained && !withheld;
  at("guess-text").replaceChildren(answers.shown(reply.best_guess, parts, true));
  at("guess-text").classList.toggle("long", answers.long(reply.best_guess, parts));
  at("guess-sentence").textContent = one.claims ? "" : `${reply.sentence}${reservation}.`;
  showSet(abstained);
  showReasoning(abstained || withheld);
  at("pieces-block").hidden = abstained || withheld || reply.silence !== "";
  at("low-note").hidden = reply.tokens.every((token) => token.probability >= 0.5);
  showPieces();
}

function showSet(abstained) {
  const found = reply.prediction_set;
  at("set").hidden = !found || abstained || reply.silence !== "";
  if (!found) return;
  at("set-options").replaceChildren(
    ...found.map((option) => {
      const item = document.createElement("li");
      item.textContent = option;
      return item;
    }),
  );
}

function showReasoning(hidden) {
  at("reasoning").hidden = hidden || !reply.reply;
  at("reasoning-text").replaceChildren(reply.reply ? markdown.render(reply.reply) : "");
}

function showThread() {
  const roles = { user: "You", assistant: "Model" };
  const earlier = before.slice(0, -2);
  at("thread-block").hidden = before.length === 0;
  at("thread-title").hidden = at("thread").hidden = earlier.length === 0;
  at("thread").replaceChildren(
    ...earlier.map((turn) => {
      const item = document.createElement("li");
      const who = document.createElement("b");
      who.textContent = `${roles[turn.role]}: `;
      item.append(who, turn.content);
      return item;
    }),
  );
}

function asked(question) {
  const system = at("system") ? at("system").value.trim() : "";
  const lines = at("options") ? at("options").value.split("\n") : [];
  return {
    question,
    before: [...(system ? [{ role: "system", content: system }] : []), ...before],
    options: lines.map((line) => line.trim()).filter((line) => line),
  };
}

function remember(question) {
  if (!run.conversations) return;
  before = [...before, { role: "user", content: question }, { role: "assistant", content: given || "-" }];
  at("question").value = "";
  fit(at("question"));
  showThread();
}

// A field as high as its text, up to eight lines.
function fit(field) {
  field.rows = Math.min(8, field.value.split("\n").length);
}

function showPieces() {
  at("pieces").replaceChildren(
    ...reply.tokens.map((token, index) => {
      const item = document.createElement("li");
      const text = document.createElement("span");
      const number = document.createElement("span");
      const end = token.text === "" && index === reply.tokens.length - 1;
      text.className = end ? "text end" : "text";
      text.textContent = end ? "end" : token.text.trim() || "·";
      number.className = "percent";
      number.textContent = percent(token.probability);
      item.append(text, number);
      item.classList.toggle("low", token.probability < 0.5);
      item.style.setProperty("--alpha", (0.08 + 0.37 * token.probability).toFixed(2));
      return item;
    }),
  );
}

function showProblem(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

async function ask(event) {
  event.preventDefault();
  const button = event.target.querySelector("button[type=submit]");
  const question = at("question").value.trim();
  if (!question || button.disabled) return;
  button.disabled = true;
  at("result").setAttribute("aria-busy", "true");
  showProblem("");
  try {
    const response = await fetch("/api/answer", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(asked(question)),
    });
    const body = await response.json();
    if (!response.ok) throw new Error(body.error.message);
    reply = body;
    at("guess").open = at("reasoning").open = false;
    showPromise();
    showReply();
    remember(question);
  } catch (error) {
    showProblem(error instanceof TypeError ? "The server cannot be reached." : error.message);
  } finally {
    button.disabled = false;
    at("result").setAttribute("aria-busy", "false");
  }
}

at("ask").addEventListener("submit", ask);
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("ask").requestSubmit();
});
at("question").addEventListener("input", () => fit(at("question")));
at("anew").addEventListener("click", () => {
  before = [];
  showThread();
  at("question").focus();
});
document.querySelectorAll(".example").forEach((example) => {
  example.addEventListener("click", () => {
    at("question").value = example.textContent;
    at("ask").requestSubmit();
  });
});
function change() {
  showPromise();
  showReply();
}

// A reload keeps the old places in some browsers.
if (slider) slider.value = slider.dataset.chosen;
if (picker) picker.value = "";
for (const control of [slider, picker]) if (control) control.addEventListener("input", change);
showPromise();
