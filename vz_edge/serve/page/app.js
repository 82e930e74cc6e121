// The page: takes a picture, shows what the model sees of it, and asks. Texts of others enter the page as text alone.

import { closeCamera, openCamera, still } from "./camera.js";
import { ask, beginAnew, isAnswering, stop } from "./conversation.js";
import { draw, extent, heat, mostAttention, patchAt, targets, tilesOf } from "./drawing.js";
import { $, askForToken, budget, percent, sec, state, tell } from "./page.js";
import { hasToken, keepToken, Refusal, send } from "./server.js";
import { explain } from "./terms.js";

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const SAMPLE_QUESTION = "What color is the star?";
const LEGENDS = {
  dominant:
    "Clear: dominant patches, those that CLS attends to most. What is veiled is not thrown away but merged into the " +
    "contextual tokens.",
  contextual:
    "Each colour: the patches that became one contextual token of their tile (colours begin anew in each tile); the " +
    "dot is the patch that the others joined. Without colour: dominant patches.",
  attention:
    "The attention that CLS pays to each patch, its mean over heads, on a square root scale. Outlined: dominant patches.",
  picture: "The picture as it is cut into tiles.",
};

let looking = null; // the request for the last look

async function start() {
  try {
    state.model = await (await send("/ui/model", null, undefined, askForToken)).json();
  } catch (error) {
    // Without a token that was given, the form says what is needed.
    return tell($("token-form").hidden || hasToken() ? error : null);
  }
  tell(null);
  $("token-form").hidden = true;
  $("model").textContent = state.model.name;
  const budgets = state.model.budgets.toSorted((one, other) => one - other);
  $("budget").hidden = budgets.length < 2;
  $("tokens").max = Math.max(0, budgets.length - 1);
  $("tokens").value = budgets.indexOf(state.model.budgets[0]);
  showBudget();
  if (state.url) look();
}

function showBudget() {
  const tokens = budget();
  $("total").textContent = tokens === undefined ? "" : `${tokens} tokens`;
  $("tokens").setAttribute("aria-valuetext", $("total").textContent);
}

// The picture

async function take(blob) {
  tell(null);
  $("send").disabled = true; // what is asked now would be asked about the picture before
  let picture;
  try {
    picture = await createImageBitmap(blob);
  } catch {
    $("send").disabled = !state.seen || isAnswering();
    return tell(new Refusal("This file is no picture that the browser can read; JPEG, PNG, WebP and GIF are."));
  }
  beginAnew();
  state.url = await dataUrl(blob);
  state.picture = picture;
  state.seen = null;
  if (state.model) await look();
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

async function look() {
  looking?.abort();
  const request = (looking = new AbortController());
  $("stage").classList.add("busy");
  $("send").disabled = true;
  try {
    const asked = { picture: state.url, tokens: budget() };
    const response = await send("/ui/look", asked, request.signal, askForToken);
    state.seen = await response.json();
    state.selected = null;
    tell(null);
    show();
  } catch (error) {
    if (looking === request && !state.seen) showNothing();
    tell(error);
  } finally {
    if (looking === request) {
      $("stage").classList.remove("busy");
      $("send").disabled = !state.seen || isAnswering();
    }
  }
}

function showNothing() {
  $("empty").hidden = false;
  $("stage").classList.remove("filled");
  $("canvas").hidden = $("seen").hidden = true;
}

function show() {
  const { seen } = state;
  $("empty").hidden = true;
  $("stage").classList.add("filled");
  $("canvas").hidden = $("seen").hidden = false;
  $("layers").hidden = !seen.grid;
  const told = { dominant: seen.tiles[0].kept, contextual: seen.tiles[0].merged, attention: seen.tiles[0].attention };
  for (const input of document.getElementsByName("view")) {
    input.disabled = input.value !== "picture" && !told[input.value];
    if (input.disabled && input.checked) document.querySelector("[name=view][value=picture]").click();
  }
  $("summary").textContent = summary(seen);
  if (told.attention) {
    const context = $("ramp").getContext("2d");
    const { width, height } = $("ramp");
    for (let x = 0; x < width; x++) {
      context.fillStyle = heat(x / (width - 1));
      context.fillRect(x, 0, 1, height);
    }
    $("most").textContent = percent(mostAttention(seen));
  }
  redraw();
}

function summary(seen) {
  const patches = seen.patches_per_side ** 2;
  const cut = seen.grid ? `${seen.grid[0]} × ${seen.grid[1]} tiles and the base tile` : "One tile";
  const tokens = `${seen.width} × ${seen.height} pixels. ${cut}, ${patches} patches each: ${seen.image_tokens} tokens`;
  const padded = seen.tiles.some(({ box }) => box[0] < 0 || box[1] < 0);
  const padding = padded ? " Grey is padding, which has patches too." : "";
  const seconds = `Tiled in ${sec(seen.preprocess_sec)}, looked at in ${sec(seen.vision_sec)}.${padding}`;
  if (!seen.dominant) return `${tokens}. This bundle keeps all of them. ${seconds}`;
  const kept = `${seen.dominant} dominant (CLS and ${seen.dominant - 1} patches) and ${seen.contextual} contextual a tile`;
  const untold = seen.tiles[0].merged ? "" : " This bundle does not tell which patches were merged, nor the attention.";
  return `${tokens}, ${kept}.${untold} ${seconds}`;
}

// As wide as there is room, and not so high that the question leaves the screen.
function fit() {
  const [left, top, right, bottom] = extent(state.seen, tilesOf(state.seen, state.layer));
  const narrow = matchMedia("(max-width: 50rem)").matches;
  const most = (narrow ? 0.42 : 0.6) * innerHeight;
  $("canvas").style.width = `min(100%, ${Math.round((most * (right - left)) / (bottom - top))}px)`;
}

function redraw() {
  if (!state.seen) return;
  fit();
  draw($("canvas"), state.picture, state.seen, state);
  $("legend").textContent = LEGENDS[state.view];
  $("scale").hidden = state.view !== "attention";
  $("patch").textContent = state.selected ? describe(state.seen, state.selected) : "Point at a patch to see what became of it.";
}

function describe(seen, [number, patch]) {
  const tile = seen.tiles[number];
  const side = seen.patches_per_side;
  const name = seen.grid && number === 0 ? "Base tile" : `Tile ${seen.grid ? number : 1}`;
  const attention = tile.attention ? ` CLS pays it ${percent(tile.attention[patch])} of its attention.` : "";
  return `${name}, row ${1 + Math.floor(patch / side)}, column ${1 + (patch % side)}${fate(seen, number, patch)}.${attention}`;
}

function fate(seen, number, patch) {
  const tile = seen.tiles[number];
  if (!tile.kept) return "";
  if (tile.kept.includes(patch + 1)) return ": a dominant token";
  if (!tile.merged) return ": merged into a contextual token";
  const token = tile.merged[patch + 1];
  const others = tile.merged.filter((other) => other === token).length - 1;
  const part = targets(seen, number).includes(patch + 1) ? "the patch that others joined" : "merged";
  return `: ${part}, contextual token ${token + 1} of ${seen.contextual}, with ${others} other${others === 1 ? "" : "s"}`;
}

// A patch under the pointer, or beside the last one

function point(event) {
  const numbers = tilesOf(state.seen, state.layer);
  const [left, top, right] = extent(state.seen, numbers);
  const scale = (right - left) / $("canvas").clientWidth;
  select(patchAt(state.seen, numbers, left + event.offsetX * scale, top + event.offsetY * scale));
}

function step(event) {
  const move = STEPS[event.key];
  if (!move || !state.seen) return;
  event.preventDefault();
  const numbers = tilesOf(state.seen, state.layer);
  const side = state.seen.patches_per_side;
  const columns = numbers.length > 1 ? state.seen.grid[0] : 1;
  const rows = numbers.length / columns;
  const [number, patch] = state.selected ?? [numbers[0], 0];
  const place = numbers.indexOf(number);
  const x = (place % columns) * side + (patch % side) + (state.selected ? move[0] : 0);
  const y = Math.floor(place / columns) * side + Math.floor(patch / side) + (state.selected ? move[1] : 0);
  if (x < 0 || y < 0 || x >= columns * side || y >= rows * side) return;
  const tile = numbers[Math.floor(y / side) * columns + Math.floor(x / side)];
  select([tile, (y % side) * side + (x % side)]);
}

function select(selected) {
  if (String(selected) === String(state.selected)) return;
  state.selected = selected;
  requestAnimationFrame(redraw);
}

// The camera

function showCamera(open) {
  $("video").hidden = $("shooting").hidden = !open;
  $("sources").hidden = open;
  $("empty").hidden = open || state.seen !== null;
  $("canvas").hidden = open || state.seen === null;
  redraw();
}

async function shoot() {
  const blob = still();
  closeCamera(showCamera);
  await take(await blob);
}

async function takeSample() {
  try {
    await take(await (await send("/ui/sample.webp")).blob());
  } catch (error) {
    return tell(error);
  }
  if (!$("question").value) $("question").value = SAMPLE_QUESTION;
  $("question").select();
}

// What happens

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken($("token").value.trim());
  explain(document);
start();
});
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) take($("file").files[0]);
  $("file").value = ""; // so that the same file can be chosen again
});
$("sample").addEventListener("click", takeSample);
$("camera").addEventListener("click", () => openCamera(showCamera));
$("close-camera").addEventListener("click", () => closeCamera(showCamera));
$("shoot").addEventListener("click", shoot);
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (isAnswering() || $("send").disabled) return;
  ask($("question").value);
  $("question").select();
});
$("stop").addEventListener("click", stop);
$("anew").addEventListener("click", () => {
  beginAnew();
  $("question").focus();
});
$("tokens").addEventListener("input", showBudget);
$("tokens").addEventListener("change", () => {
  beginAnew(); // the model reads another picture
  if (state.url) look();
});
for (const name of ["view", "layer"]) {
  for (const input of document.getElementsByName(name)) {
    input.addEventListener("change", () => {
      Object.assign(state, { [name]: input.value, selected: null });
      redraw();
    });
  }
}
$("canvas").addEventListener("pointermove", point);
$("canvas").addEventListener("pointerdown", point);
$("canvas").addEventListener("pointerleave", () => select(null));
$("canvas").addEventListener("keydown", step);
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("stage").classList.add("over");
});
for (const name of ["dragleave", "drop"]) addEventListener(name, () => $("stage").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
});
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
explain(document);
start();
