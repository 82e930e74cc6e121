// The words of the field, explained where they stand: on hover, on a tap, and when a key brings the focus there.

import { $ } from "./page.js";

const TERMS = {
  "system prompt":
    "What the model is told before the conversation: who it is, and how to answer. Not every model was " +
    "trained with one.",
  choices: "The answer is one of the words that you give, whatever the model would rather say.",
  schema: "The answer is JSON that fits a JSON schema: the model can write nothing else.",
  "token budget":
    "How many tokens a picture may become, at the largest number of tiles. Fewer are read sooner and show " +
    "less.",
  dominant:
    "Dominant tokens: the patches of a tile that CLS, the token that sums up a tile, attends to most. They " +
    "are kept as they are.",
  contextual: "Contextual tokens: each is the mean of patches that look alike and were not kept by themselves.",
  attention:
    "How much CLS, the token that sums up a tile, looks at each patch. The patches with the most become " +
    "dominant.",
  tile:
    "A tile: a square part of the picture that the vision tower looks at in one go. It is cut into patches.",
  grid: "The tiles that hold the picture at full resolution, side by side.",
  "base tile": "The whole picture made small, as one more tile: the model sees the whole in it.",
  preprocess: "Cutting the picture into tiles, and pixels into numbers.",
  vision: "The vision tower turns the tiles into tokens. It is spared where the picture is known from before.",
  prefill:
    "The language model reads the picture's and the conversation's tokens. What it remembers from before is " +
    "spared.",
  decode: "The language model writes the answer, one token after the other.",
  token:
    "What the language model reads and writes one by one: a piece of text of some characters, or a piece of " +
    "the picture.",
  patch: "A square of 14 x 14 pixels of a tile, in most models. The vision tower makes one token of each.",
  CLS: "A token that belongs to no patch: in it the vision tower sums up a whole tile.",
};

// Let whatever has data-term in `root` tell its term. What has no input of its own takes the focus itself.
export function explain(root) {
  for (const element of root.querySelectorAll("[data-term]")) {
    const inner = element.querySelector("input") ?? (element.htmlFor ? $(element.htmlFor) : null);
    const focused = inner ?? element;
    if (!inner) element.tabIndex = 0;
    element.addEventListener("pointerenter", () => show(element, focused));
    element.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && hide());
    focused.addEventListener("focus", () => focused.matches(":focus-visible") && show(element, focused));
    focused.addEventListener("blur", hide);
    focused.addEventListener("input", hide); // who has begun to use it need not read on
  }
}

function show(element, described) {
  const tip = $("tip");
  tip.textContent = TERMS[element.dataset.term];
  tip.hidden = false;
  described.setAttribute("aria-describedby", "tip");
  const box = (element.contains(described) ? element : described).getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8));
  const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${(below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + scrollY}px`;
}

function hide() {
  $("tip").hidden = true;
  document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
}

addEventListener("keydown", (event) => event.key === "Escape" && hide());
addEventListener("pointerdown", (event) => event.target.closest?.("[data-term]") || hide());
