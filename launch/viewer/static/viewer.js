// The keyboard, and lists that change without a new page. Pages work without it; text of models never comes through here
// but as nodes that the server has escaped.
import { keys } from "./keys.js";
import { list } from "./list.js";
import { tokens } from "./tokens.js";

document.documentElement.classList.add("js");

const actions = {
  help: () => document.getElementById("help").showModal(),
  theme() {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    document.cookie = `theme=${root.dataset.theme}; path=/; max-age=31536000; samesite=strict`;
  },
};

// What was taken from the back-and-forward cache may have another theme than was chosen since.
addEventListener("pageshow", (event) => {
  const theme = /(?:^|; )theme=(light|dark)/.exec(document.cookie);
  if (event.persisted && theme) document.documentElement.dataset.theme = theme[1];
});

const page = document.body.classList;
if (page.contains("list")) Object.assign(actions, list());
if (page.contains("tokenview")) Object.assign(actions, tokens());
keys(actions);

document.addEventListener("click", (event) => {
  const act = event.target.closest("[data-act]")?.dataset.act;
  if (act && actions[act]) actions[act]();
});
for (const select of document.querySelectorAll("select[data-submit]"))
  select.addEventListener("change", () => select.form.requestSubmit());
