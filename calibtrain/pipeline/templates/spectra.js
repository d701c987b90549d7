(() => {
{% include "theme.js" %}

  const holder = document.getElementById("data");
  if (!holder) return;
  const { axes, matrices } = JSON.parse(holder.textContent);
  const at = (id) => document.getElementById(id);
  const chosen = at("matrix");
  const path = (xs, ys, low, high) => {
    const x = (share) => axes.x0 + share * (axes.x1 - axes.x0);
    const y = (value) => axes.y0 + ((Math.min(Math.max(value, low), high) - low) / (high - low)) * (axes.y1 - axes.y0);
    return xs.length ? "M" + xs.map((share, i) => `${x(share).toFixed(2)},${y(ys[i]).toFixed(2)}`).join("L") : "";
  };
  const ticks = (id, texts) => {
    const all = at(id).closest("svg").querySelectorAll(".tick"); // those beside the figure come first
    texts.forEach((text, i) => { all[i].textContent = text; });
  };
  const show = () => {
    const one = matrices[chosen.value];
    const [low, high] = one.range;
    const log = (value) => (value > 0 ? Math.log10(value) : low);
    at("before").setAttribute("d", path(one.at, one.before.map(log), low, high));
    at("after").setAttribute("d", path(one.at, one.before.map((value, i) => log(value * (1 + one.change[i]))), low, high));
    at("change").setAttribute("d", path(one.at, one.change, -one.limit, one.limit));
    ticks("before", one.ticks[0]);
    ticks("change", one.ticks[1]);
    document.querySelectorAll("#facts dd").forEach((fact, i) => { fact.textContent = one.facts[i]; });
  };
  at("choose").hidden = false;
  chosen.addEventListener("change", show);
  show(); // a reload may keep what was chosen
})();
