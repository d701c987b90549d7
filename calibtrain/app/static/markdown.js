// A small part of Markdown as elements, from text that nobody vouches for: every character enters by textContent, no
// attribute is made of it, and addresses stay text. Blocks: paragraphs, headings, lists, quotes, rules, fenced code.
"use strict";

const markdown = (() => {
  const MARKS = /(`+)([^`]+)\1|\*\*([^*\n]+)\*\*|__([^_\n]+)__|\*([^*\s][^*\n]*)\*|(?<![\p{L}\p{N}_])_([^_\s][^_\n]*)_(?![\p{L}\p{N}_])/gu;
  const FENCE = /^ {0,3}(```+|~~~+)/;
  const HEADING = /^ {0,3}#{1,6}\s+(.+?)\s*#*$/;
  const RULE = /^ {0,3}(?:-{3,}|\*{3,}|_{3,})\s*$/;
  const BULLET = /^\s*[-*+]\s+(.*)$/;
  const NUMBER = /^\s*(\d{1,9})[.)]\s+(.*)$/;
  const QUOTE = /^ {0,3}>\s?(.*)$/;

  function element(name, text, className) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  // Code, bold and emphasis, one level deep.
  function inline(parent, text) {
    let last = 0;
    for (const found of text.matchAll(MARKS)) {
      parent.append(text.slice(last, found.index));
      const [whole, , code, bold, bolder, soft, softer] = found;
      if (code !== undefined) parent.append(element("code", code));
      else parent.append(element(bold ?? bolder ? "strong" : "em", bold ?? bolder ?? soft ?? softer));
      last = found.index + whole.length;
    }
    parent.append(text.slice(last));
    return parent;
  }

  function fenced(lines, start) {
    const fence = lines[start].match(FENCE)[1];
    let end = start + 1;
    while (end < lines.length && !lines[end].trimStart().startsWith(fence)) end += 1;
    const block = element("pre");
    block.tabIndex = 0; // so that the keyboard can scroll it
    block.append(element("code", lines.slice(start + 1, end).join("\n")));
    return [block, end + 1];
  }

  function list(lines, start, pattern) {
    const made = element(pattern === NUMBER ? "ol" : "ul");
    if (pattern === NUMBER) made.start = Number(lines[start].match(NUMBER)[1]);
    let place = start;
    for (; place < lines.length && pattern.test(lines[place]) && !RULE.test(lines[place]); place += 1) {
      made.append(inline(element("li"), lines[place].match(pattern).at(-1)));
    }
    return [made, place];
  }

  function quote(lines, start) {
    let end = start;
    while (end < lines.length && QUOTE.test(lines[end])) end += 1;
    const inside = lines.slice(start, end).map((line) => line.match(QUOTE)[1]);
    const made = element("blockquote");
    made.append(inline(element("p"), inside.join("\n")));
    return [made, end];
  }

  const opens = (line) => [FENCE, HEADING, RULE, BULLET, NUMBER, QUOTE].some((pattern) => pattern.test(line));

  function paragraph(lines, start) {
    let end = start + 1;
    while (end < lines.length && lines[end].trim() && !opens(lines[end])) end += 1;
    return [inline(element("p"), lines.slice(start, end).join("\n")), end];
  }

  function block(lines, place) {
    const line = lines[place];
    if (FENCE.test(line)) return fenced(lines, place);
    // The page has its own headings: one of a model's is no place to jump to.
    if (HEADING.test(line)) return [inline(element("p", undefined, "heading"), line.match(HEADING)[1]), place + 1];
    if (RULE.test(line)) return [element("hr"), place + 1];
    if (BULLET.test(line)) return list(lines, place, BULLET);
    if (NUMBER.test(line)) return list(lines, place, NUMBER);
    if (QUOTE.test(line)) return quote(lines, place);
    return paragraph(lines, place);
  }

  function render(text) {
    const made = document.createDocumentFragment();
    const lines = text.replace(/\r\n?/g, "\n").split("\n");
    for (let place = 0; place < lines.length; ) {
      if (!lines[place].trim()) {
        place += 1;
        continue;
      }
      const [one, next] = block(lines, place);
      made.append(one);
      place = next;
    }
    return made;
  }

  const marked = (text) => text.includes("\n") || opens(text) || text.search(MARKS) >= 0;
  return { render, marked };
})();
