(() => {
{% include "theme.js" %}

  const holder = document.getElementById("data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const at = (id) => document.getElementById(id);
  const slider = at("threshold");
  const percent = (share, digits = 0) => (100 * share).toFixed(digits) + "%";
  const show = () => {
    const row = data.rows[slider.value];
    const right = row.answered - row.wrong;
    const refused = data.n - row.answered;
    const lost = data.right - right;
    const risk = row.answered ? `${row.wrong} of them wrong (${percent(row.wrong / row.answered, 1)}, interval ${percent(row.low, 1)} to ${percent(row.high, 1)})` : "so none can be wrong";
    at("live").textContent = `Of ${data.n} questions it answers ${row.answered}, ${risk}. It refuses ${refused}, ${lost} of which it would have got right.`;
    at("threshold-value").textContent = percent(row.threshold, 1) + (Number(slider.value) === data.certified ? " ◆ certified" : "");
    slider.setAttribute("aria-valuetext", `threshold ${percent(row.threshold, 1)}: answers ${row.answered} of ${data.n}, ${row.wrong} wrong`);
    for (const [id, count] of [["part-right", right], ["part-wrong", row.wrong], ["part-refused", refused]]) {
      at(id).style.flex = `0 1 ${(100 * count) / data.n}%`;
      at(id).hidden = count === 0;
    }
    at("count-right").textContent = right;
    at("count-wrong").textContent = row.wrong;
    at("count-refused").textContent = refused;
    const marker = at("tradeoff-marker");
    const place = (value, low, high, from, to) => from + ((value - low) / (high - low)) * (to - from);
    marker.setAttribute("cx", place(refused / data.n, 0, 1, data.axes.x0, data.axes.x1));
    marker.setAttribute("cy", place(row.wrong / data.n, 0, data.axes.top, data.axes.y0, data.axes.y1));
  };
  slider.addEventListener("input", show);
  const jump = at("jump");
  if (jump) jump.addEventListener("click", () => { slider.value = data.certified; show(); slider.focus(); });
  show();
})();
