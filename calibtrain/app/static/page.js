// Whatever the model or a person wrote enters the page by textContent alone.
"use strict";

const at = (id) => document.getElementById(id);
const levels = JSON.parse(at("levels").textContent);
const groups = JSON.parse(at("groups").textContent);
const slider = at("risk");
const picker = at("group");
let reply = null;

function percent(probability) {
  if (probability < 0.005) return "less than 1%";
  if (probability >= 0.995) return "more than 99%";
  return `${(100 * probability).toFixed(0)}%`;
}

function level() {
  const chosen = picker ? picker.value : "";
  if (chosen !== "") return groups[Number(chosen)];
  return levels[slider ? Number(slider.value) : 0];
}

function promise(one) {
  if (one.threshold === null) return "It answers nothing.";
  if (one.risk === null) return "It answers everything. How often it is wrong is then not promised.";
  const often = `At most ${one.risk} of its answers are wrong.`;
  return `${often} It answers about ${percent(one.coverage)} of questions: those it is at least ${percent(one.threshold)} sure of.`;
}

function showPromise() {
  const one = level();
  const text = promise(one);
  at("promise").textContent = text;
  at("scope").textContent = one.promise;
  at("limit").textContent = one.limit;
  if (!slider) return;
  slider.disabled = picker !== null && picker.value !== "";
  slider.setAttribute("aria-valuetext", text);
  document.querySelectorAll(".stops li").forEach((stop, index) => {
    stop.classList.toggle("chosen", !slider.disabled && index === Number(slider.value));
  });
}

function reason(one, abstained) {
  if (one.threshold === null) return "Nothing is certified here, so I do not answer.";
  const chance = `My best guess has a ${percent(reply.confidence)} chance of being right`;
  if (one.risk === null) return `${chance}. I answer whatever the chance.`;
  const rule = `I answer from ${percent(one.threshold)} on, so that at most ${one.risk} of my answers are wrong.`;
  return abstained ? `${chance}; ${rule}` : rule;
}

function state(one, abstained) {
  if (one.threshold === null) return "Nothing is certified";
  if (one.risk === null) return "Answers everything";
  return abstained ? "Not sure enough to answer" : "Sure enough to answer";
}

function place(element, share) {
  element.style.setProperty("--at", `${100 * share}%`);
}

function showReply() {
  if (!reply) return;
  const one = level();
  const abstained = one.threshold === null || !(reply.confidence >= one.threshold);
  at("result").hidden = false;
  document.body.classList.add("answered");
  at("result").classList.toggle("refused", abstained);
  at("asked").textContent = reply.question;
  at("state").textContent = state(one, abstained);
  at("chance").textContent = percent(reply.confidence).replace("less than ", "<").replace("more than ", ">");
  at("answer").textContent = abstained ? reply.refusal : reply.best_guess || "(an empty answer)";
  at("sentence").textContent = abstained ? "" : `${reply.sentence}${one.reservation}.`;
  at("sentence").hidden = abstained;
  at("reason").textContent = reason(one, abstained);
  at("gauge").setAttribute("aria-valuenow", (100 * reply.confidence).toFixed(0));
  at("gauge").setAttribute("aria-valuetext", `${percent(reply.confidence)}, ${reply.word}`);
  place(at("fill"), reply.confidence);
  at("measure").hidden = one.threshold === null; // a chance that nothing vouches for is not shown at a glance
  at("mark").hidden = at("mark-label").hidden = one.risk === null;
  if (one.risk !== null) {
    place(at("mark"), one.threshold);
    place(at("mark-label"), Math.min(0.8, Math.max(0.2, one.threshold)));
    at("mark-label").textContent = `answers from ${percent(one.threshold)}`;
  }
  at("guess").hidden = !abstained;
  at("guess-text").textContent = reply.best_guess || "(an empty answer)";
  at("guess-sentence").textContent = `${reply.sentence}${one.reservation}.`;
  at("pieces-block").hidden = abstained;
  at("low-note").hidden = reply.tokens.every((token) => token.probability >= 0.5);
  showPieces();
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
  if (!question) return;
  button.disabled = true;
  at("result").setAttribute("aria-busy", "true");
  showProblem("");
  try {
    const response = await fetch("/api/answer", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ question }),
    });
    const body = await response.json();
    if (!response.ok) throw new Error(body.error.message);
    reply = body;
    at("guess").open = false;
    showReply();
  } catch (error) {
    showProblem(error instanceof TypeError ? "The server cannot be reached." : error.message);
  } finally {
    button.disabled = false;
    at("result").setAttribute("aria-busy", "false");
  }
}

at("ask").addEventListener("submit", ask);
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
