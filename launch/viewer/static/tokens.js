// The token view: which colour, and what is known of the token that is pointed at.

export function tokens() {
  const stage = document.querySelector(".stage");
  if (!stage) return {};
  const box = document.getElementById("tokens");
  const panel = document.getElementById("token");
  const all = [...box.querySelectorAll(".tok")];
  let at = -1;

  const line = (list, name, value) => {
    const term = document.createElement("dt");
    const said = document.createElement("dd");
    term.textContent = name;
    said.textContent = value;
    list.append(term, said);
  };

  function show(token) {
    all[at]?.classList.remove("at");
    at = all.indexOf(token);
    token.classList.add("at");
    const { id, span, weight, turn, lp, top } = token.dataset;
    const text = document.createElement("code");
    text.textContent = token.textContent.replaceAll("\u23ce\n", "\u23ce") || "\u00b7";
    const list = document.createElement("dl");
    line(list, "id", id);
    line(list, "type", span);
    line(list, "weight", weight);
    line(list, "turn", turn > 0 ? turn : "only read");
    if (lp !== undefined) line(list, "log p", `${lp} (${(100 * Math.exp(lp)).toPrecision(3)}%)`);
    panel.replaceChildren(text, list);
    if (!top) return;
    const title = document.createElement("p");
    title.className = "faint";
    title.textContent = "likeliest here";
    const likely = document.createElement("dl");
    for (const each of top.split("\n").filter(Boolean)) {
      const cut = each.lastIndexOf("\t");
      line(likely, each.slice(0, cut), each.slice(cut + 1));
    }
    panel.append(title, likely);
  }

  box.addEventListener("pointerover", (event) => {
    const token = event.target.closest(".tok");
    if (token) show(token);
  });
  box.addEventListener("click", (event) => {
    const token = event.target.closest(".tok");
    if (token) show(token);
  });
  const step = (by) => {
    box.focus({ preventScroll: true });
    const next = all[Math.max(0, Math.min(all.length - 1, at + by))];
    if (!next) return;
    show(next);
    next.scrollIntoView({ block: "nearest" });
  };
  const colour = (by) => {
    stage.dataset.by = by;
    const button = document.querySelector(`input[name=by][value=${by}]`);
    if (button) button.checked = true;
  };
  document.getElementById("legend").addEventListener("change", (event) => colour(event.target.value));
  return {
    keys: {
      ArrowRight: () => step(1),
      ArrowLeft: () => step(-1),
      l: () => document.querySelector("input[name=by]") && colour(stage.dataset.by === "span" ? "lp" : "span"),
    },
  };
}
