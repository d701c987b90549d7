// How an answer is shown: JSON, claims one by one, Markdown, or a few words; by textContent alone.
"use strict";

const answers = (() => {
  function percent(probability) {
    if (probability < 0.005) return "less than 1%";
    if (probability >= 0.995) return "more than 99%";
    return `${(100 * probability).toFixed(0)}%`;
  }

  function element(name, text, className) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function parsed(text) {
    if (!/^\s*[[{]/.test(text)) return undefined;
    try {
      return JSON.parse(text);
    } catch {
      return undefined;
    }
  }

  // Claims in their text: what is kept stands, shaded by its chance; in the place of what is withheld is a mark.
  function claims(text, parts) {
    const letters = Array.from(text); // places count characters, not UTF-16 units
    const made = element("p", undefined, "claims");
    let last = 0;
    for (const part of [...parts].sort((a, b) => a.start - b.start)) {
      if (part.start < last) continue;
      made.append(letters.slice(last, part.start).join(""));
      if (part.kept) {
        const claim = element("span", letters.slice(part.start, part.stop).join(""), "claim");
        claim.style.setProperty("--alpha", (0.08 + 0.37 * part.probability).toFixed(2));
        claim.classList.toggle("low", part.probability < 0.5);
        made.append(claim, element("span", ` ${percent(part.probability)}`, "claim-chance"));
      } else {
        made.append(element("span", "[withheld]", "withheld"));
      }
      last = part.stop;
    }
    made.append(letters.slice(last).join(""));
    return made;
  }

  // Every part with its chance and whether it is given; `hide`: without the text of those that are not.
  function table(parts, hide) {
    const made = element("table", undefined, "parts");
    const head = element("tr");
    for (const title of ["Part", "Answer", "How sure"]) {
      const cell = element("th", title);
      cell.scope = "col";
      head.append(cell);
    }
    made.append(element("caption", "Each part, and how sure it is", "soft"), element("thead"), element("tbody"));
    made.tHead.append(head);
    for (const part of parts) {
      const row = element("tr", undefined, part.kept ? "" : "withheld-row");
      const name = element("th", part.name);
      name.scope = "row";
      const shown = part.kept ? part.text : hide ? "withheld" : `${part.text} (withheld)`;
      row.append(name, element("td", shown), element("td", `${percent(part.probability)}, ${part.word}`));
      made.tBodies[0].append(row);
    }
    return made;
  }

  // The answer as elements. `all`: also what is withheld of it, for who asks to see it.
  function shown(text, parts, all) {
    const made = document.createDocumentFragment();
    const value = parsed(text);
    const withheld = parts.some((part) => !part.kept);
    if (value !== undefined && typeof value === "object") {
      if (!withheld || all) {
        const block = element("pre", JSON.stringify(value, null, 2), "json");
        block.tabIndex = 0;
        made.append(block);
      }
      if (parts.length) made.append(table(parts, !all));
    } else if (parts.length) {
      made.append(claims(text, all ? parts.map((part) => ({ ...part, kept: true })) : parts));
    } else if (markdown.marked(text)) {
      made.append(markdown.render(text));
    } else {
      made.append(text || "(an empty answer)");
    }
    return made;
  }

  // Whether it is more than a few words on a line.
  const long = (text, parts) => parts.length > 0 || parsed(text) !== undefined || text.includes("\n") || text.length > 120;
  // What is given of a text in parts.
  const kept = (text, parts) =>
    parts.filter((part) => part.kept).map((part) => Array.from(text).slice(part.start, part.stop).join("")).join(" ");
  return { percent, shown, long, kept };
})();
