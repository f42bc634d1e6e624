// Every shortcut of every page. Single letters do nothing while somebody types, and none with a modifier is taken.

const typing = (target) => target.closest("input:not([type=checkbox], [type=radio]), select, textarea, [contenteditable]");
const follow = (key) => document.querySelector(`a[data-key="${key}"]`)?.click();

/** Focus the next or the last of `items`, and bring it into view. */
function move(items, by, current = document.activeElement) {
  if (!items.length) return;
  const at = items.findIndex((each) => each === current || each.contains(current));
  const next = items[at < 0 ? (by > 0 ? 0 : items.length - 1) : Math.max(0, Math.min(items.length - 1, at + by))];
  next.focus({ preventScroll: true });
  next.scrollIntoView({ block: next.matches("section") ? "start" : "nearest" });
}

/** `actions`: what a page can do beside moving, by name. */
export function keys(actions) {
  const rows = () => [...document.querySelectorAll("a.row")];
  const steps = () => [...document.querySelectorAll(".step")];
  const go = (by) => {
    if (rows().length) return move(rows(), by);
    const all = steps();
    // Where nothing has the focus, one goes on from the step that is read.
    const focused = all.find((each) => each.contains(document.activeElement));
    const read = all.findLast((each) => each.getBoundingClientRect().top < 100);
    move(all, by, focused ?? read ?? null);
  };
  const byKey = {
    j: () => go(1),
    k: () => go(-1),
    ArrowRight: () => !rows().length && go(1),
    ArrowLeft: () => !rows().length && go(-1),
    n: () => document.querySelector('a[rel="next"]')?.click(),
    p: () => document.querySelector('a[rel="prev"]')?.click(),
    u: () => follow("u"),
    v: () => follow("v"),
    c: () => follow("c"),
    t: () => actions.theme(),
    "?": () => actions.help(),
    "/": () => actions.search ? actions.search() : (location.href = document.querySelector(".brand").href.split("#")[0] + "#q"),
    ...actions.keys,
  };
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape" && typing(event.target)) {
      event.preventDefault(); // browsers empty a search field then
      return event.target.blur();
    }
    if (typing(event.target)) return;
    // Arrows scroll a text that is wider than its box, and choose among buttons.
    if (event.key.startsWith("Arrow") && event.target.closest("pre:not(.tokens), [type=radio], summary")) return;
    const act = byKey[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  steps().length && mark(steps());
}

/** Tell in the outline which step is being read. */
function mark(steps) {
  const links = new Map([...document.querySelectorAll(".outline a")].map((each) => [each.hash, each]));
  if (!links.size) return;
  let now;
  const seen = new IntersectionObserver(
    () => {
      const read = steps.findLast((each) => each.getBoundingClientRect().top < innerHeight / 3) ?? steps[0];
      if (read === now) return;
      now = read;
      for (const [hash, link] of links) hash === `#${read.id}` ? link.setAttribute("aria-current", "step") : link.removeAttribute("aria-current");
    },
    { threshold: [0, 0.25, 0.5, 0.75, 1] },
  );
  steps.forEach((each) => seen.observe(each));
}
