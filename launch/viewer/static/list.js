// The list: a change of a filter fetches the page that its address names and takes over its parts, so that nothing jumps
// and nothing typed is lost. The address is the state: back, forward and a copied link work.

const policy = globalThis.trustedTypes?.createPolicy("pages", { createHTML: (page) => page }) ?? { createHTML: (page) => page };
const PARTS = ["facets", "results", "progress"];
const TYPED_PAUSE_MS = 250;
const LOOK_EVERY_MS = 2000;

export function list() {
  const form = document.getElementById("filter");
  const filters = document.getElementById("filters");
  if (matchMedia("(max-width: 46rem)").matches) filters.open = false;
  if (location.hash === "#q") focusSearch();
  let asked = 0;
  let running;

  function address() {
    const query = new URLSearchParams();
    for (const [name, value] of new FormData(form)) {
      if (value.trim() && !(name === "sort" && value === "-time")) query.append(name, value);
    }
    const text = query.toString();
    return text ? `/?${text}` : "/";
  }

  /** Show another address in place. `push`: add it to the history. */
  async function show(url, push, keepScroll) {
    const number = ++asked;
    running?.abort();
    running = new AbortController();
    document.getElementById("results").setAttribute("aria-busy", "true");
    let made;
    try {
      const answer = await fetch(url, { signal: running.signal, headers: { accept: "text/html" } });
      made = new DOMParser().parseFromString(policy.createHTML(await answer.text()), "text/html");
    } catch (error) {
      if (error.name === "AbortError") return;
      return location.assign(url); // the server is gone: the browser says so better
    }
    if (number !== asked) return;
    if (!made.getElementById("results")) return location.assign(url); // it refuses, and says why
    if (push) history.pushState(null, "", url);
    const focused = document.activeElement?.id;
    const row = [...document.querySelectorAll("a.row")].indexOf(document.activeElement);
    const opened = [...document.querySelectorAll("#facets details")].map((each) => each.open);
    for (const part of PARTS) document.getElementById(part).replaceWith(document.adoptNode(made.getElementById(part)));
    document.querySelectorAll("#facets details").forEach((each, i) => (each.open = opened[i] ?? false));
    document.title = made.title;
    if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
    else if (row >= 0) document.querySelectorAll("a.row")[row]?.focus({ preventScroll: true });
    if (!keepScroll) scrollTo(0, 0);
    return made;
  }

  /** Fields that are outside of the swapped parts take the values of what is shown. */
  function fill(made) {
    for (const id of ["q", "task", "steps_min", "steps_max", "score_min", "score_max", "sort-kept"]) {
      const field = document.getElementById(id);
      if (made && field !== document.activeElement) field.value = made.getElementById(id).value;
    }
  }

  let timer;
  const change = (pause) => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const url = address();
      if (url !== location.pathname + location.search) show(url, true);
    }, pause);
  };
  document.addEventListener("input", (event) => {
    if (event.target.form === form && event.target.matches("input:not([type=checkbox])")) change(TYPED_PAUSE_MS);
  });
  document.addEventListener("change", (event) => {
    if (event.target.id === "sort") document.getElementById("sort-kept").value = event.target.value;
    if (event.target.form === form || event.target.id === "sort") change(0);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    change(0);
    if (document.activeElement.id === "q") document.querySelector("a.row")?.focus({ preventScroll: true });
  });
  document.addEventListener("click", async (event) => {
    const link = event.target.closest("a[data-swap]");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    fill(await show(link.getAttribute("href"), true));
  });
  addEventListener("popstate", async () => {
    if (location.pathname === "/") fill(await show(location.pathname + location.search, false));
  });

  // Rows that are still being written: they come by themselves at the top of an untouched list, else they are announced.
  const refresh = () => show(location.pathname + location.search, false, true);
  let seen = Number(document.getElementById("progress").dataset.version);
  let reading = document.getElementById("progress").dataset.reading === "true";
  async function look() {
    let progress;
    try {
      progress = await (await fetch("/progress")).json();
    } catch {
      return; // the viewer was ended; the next click says so
    }
    const line = document.getElementById("progress");
    line.textContent = progress.text;
    line.hidden = !progress.text;
    const results = document.getElementById("results");
    const searched = document.getElementById("q").value && reading;
    if (progress.version === seen && !(searched && !progress.reading)) return;
    const untouched = results.dataset.paged === "false" && scrollY < 40 && !document.activeElement?.matches("a.row, select");
    if (untouched) await refresh();
    else document.getElementById("fresh").hidden = false;
    seen = progress.version;
    reading = progress.reading;
  }
  setInterval(() => document.hidden || look(), LOOK_EVERY_MS);

  function focusSearch() {
    const field = document.getElementById("q");
    field.focus();
    field.select();
  }
  return {
    refresh,
    search: focusSearch,
    keys: {
      r: refresh,
      x: () => document.querySelector("a.clear")?.click(),
      e() {
        const box = document.getElementById("export");
        box.open = !box.open;
        box.querySelector(box.open ? "a" : "summary").focus();
      },
      f() {
        filters.open = true;
        filters.querySelector("input").focus();
      },
    },
  };
}
