// The page: takes a picture, shows what the model sees of it, and asks. Texts of others enter the page as text alone.

import { draw, extent, heat, mostAttention, patchAt, targets, tilesOf } from "./drawing.js";

const TOKEN = "vz-edge token";
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
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

const $ = (id) => document.getElementById(id);
const state = { model: null, picture: null, url: null, seen: null, view: "dominant", layer: "grid", selected: null };
let looking = null; // the request for the last look
let answering = null; // the request for the answer that is being written

// The server

class Refusal extends Error {}

async function send(path, body, signal) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const options = { headers, signal };
  if (body) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer: it has ended, or the connection is broken.");
  }
  if (response.ok) return response;
  if (response.status === 401) $("token-form").hidden = false;
  const told = await response.json().catch(() => null);
  throw new Refusal(told?.error?.message ?? `The server answered with status ${response.status}.`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (text + value).split("\n\n");
    text = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function tell(error) {
  if (error?.name === "AbortError") return;
  $("problem").textContent = error ? error.message : "";
  $("problem").hidden = !error;
}

async function start() {
  try {
    state.model = await (await send("/ui/model")).json();
  } catch (error) {
    // Without a token that was given, the form says what is needed.
    return tell($("token-form").hidden || sessionStorage.getItem(TOKEN) ? error : null);
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

// The budget

function budget() {
  const budgets = state.model?.budgets ?? [];
  return budgets.length < 2 ? undefined : budgets.toSorted((one, other) => one - other)[$("tokens").value];
}

function showBudget() {
  const tokens = budget();
  $("total").textContent = tokens === undefined ? "" : `${tokens} tokens`;
  $("tokens").setAttribute("aria-valuetext", $("total").textContent);
}

// The picture

async function take(blob) {
  tell(null);
  let picture;
  try {
    picture = await createImageBitmap(blob);
  } catch {
    return tell(new Refusal("This file is no picture that the browser can read; JPEG, PNG, WebP and GIF are."));
  }
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
    const response = await send("/ui/look", { picture: state.url, tokens: budget() }, request.signal);
    state.seen = await response.json();
    state.selected = null;
    tell(null);
    show();
  } catch (error) {
    tell(error);
  } finally {
    if (looking === request) {
      $("stage").classList.remove("busy");
      $("send").disabled = !state.seen || answering !== null;
    }
  }
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

function redraw() {
  if (!state.seen) return;
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

const REFUSALS = {
  NotAllowedError: "The camera was not allowed. Allow it for this page in the browser, or choose a picture.",
  NotFoundError: "This machine has no camera. Choose a picture instead.",
  NotReadableError: "The camera is in use by another program. Close that, or choose a picture.",
};

async function openCamera() {
  tell(null);
  if (!navigator.mediaDevices) {
    return tell(
      new Refusal("The browser gives the camera to pages on localhost or over HTTPS alone. Choose a picture instead."),
    );
  }
  try {
    const video = { facingMode: "environment", width: { ideal: 1280 }, height: { ideal: 960 } };
    $("video").srcObject = await navigator.mediaDevices.getUserMedia({ video });
    await $("video").play();
  } catch (error) {
    return tell(new Refusal(REFUSALS[error.name] ?? `The camera cannot be used: ${error.message}`));
  }
  showCamera(true);
  $("shoot").focus();
}

function closeCamera() {
  $("video").srcObject?.getTracks().forEach((track) => track.stop());
  $("video").srcObject = null;
  showCamera(false);
  $("camera").focus();
}

function showCamera(open) {
  $("video").hidden = $("shooting").hidden = !open;
  $("sources").hidden = open;
  $("empty").hidden = open || state.seen !== null;
  $("canvas").hidden = open || state.seen === null;
  redraw();
}

async function shoot() {
  const still = new OffscreenCanvas($("video").videoWidth, $("video").videoHeight);
  still.getContext("2d").drawImage($("video"), 0, 0);
  closeCamera();
  await take(await still.convertToBlob({ type: "image/jpeg", quality: 0.95 }));
}

// Questions

async function ask(question) {
  answering = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  $("answers").prepend($("answer").content.cloneNode(true));
  const item = $("answers").firstElementChild;
  const [asked, text] = [item.querySelector(".question"), item.querySelector(".text")];
  asked.textContent = question;
  text.classList.add("waiting");
  const content = [
    { type: "image_url", image_url: { url: state.url } },
    { type: "text", text: question },
  ];
  const body = { model: state.model.name, messages: [{ role: "user", content }], stream: true, tokens: budget() };
  try {
    const options = { stream_options: { include_usage: true } };
    const response = await send("/v1/chat/completions", { ...body, ...options }, answering.signal);
    for await (const event of events(response)) {
      if (event.error) throw new Refusal(event.error.message);
      text.textContent += event.choices[0]?.delta.content ?? "";
      if (event.timings) showTimings(item, event.timings, event.usage);
    }
  } catch (error) {
    item.querySelector(".usage").textContent = error.name === "AbortError" ? "Stopped." : "Not answered.";
    tell(error);
  } finally {
    text.classList.remove("waiting");
    answering = null;
    $("send").hidden = false;
    $("send").disabled = !state.seen;
    $("stop").hidden = true;
  }
}

// The stages one after the other, on one scale from the question to the last token.
function showTimings(item, timings, usage) {
  const stages = [timings.preprocess_sec, timings.vision_sec, timings.prefill_sec, timings.decode_sec];
  const total = stages.reduce((sum, seconds) => sum + seconds, 0);
  const bars = item.querySelectorAll(".timings i");
  const values = item.querySelectorAll(".timings output");
  let begun = 0;
  stages.forEach((seconds, index) => {
    bars[index].style.marginLeft = `${(100 * begun) / total}%`;
    bars[index].style.width = `${(100 * seconds) / total}%`;
    values[index].textContent = sec(seconds);
    begun += seconds;
  });
  item.querySelector(".timings").hidden = false;
  const { image_tokens: image, cached_tokens: cached } = usage.prompt_tokens_details;
  const written = usage.completion_tokens;
  const speed = written > 1 ? `, ${rate(written - 1, timings.decode_sec)} a second after the first` : "";
  const read = cached ? `, ${cached} of them read before` : " read";
  item.querySelector(".usage").textContent =
    `First token after ${sec(total - timings.decode_sec)}. ${image} picture and ${usage.prompt_tokens - image} ` +
    `text tokens${read}, ${written} written${speed}.`;
}

const sec = (seconds) => (seconds < 1 ? `${(1000 * seconds).toFixed(0)} ms` : `${seconds.toFixed(2)} s`);
const rate = (tokens, seconds) => (tokens / seconds).toFixed(tokens / seconds < 100 ? 1 : 0);
const percent = (share) => `${(100 * share).toPrecision(2)} %`;

// What happens

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, $("token").value.trim());
  start();
});
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) take($("file").files[0]);
  $("file").value = ""; // so that the same file can be chosen again
});
$("camera").addEventListener("click", openCamera);
$("close-camera").addEventListener("click", closeCamera);
$("shoot").addEventListener("click", shoot);
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!answering && !$("send").disabled) ask($("question").value);
});
$("stop").addEventListener("click", () => answering?.abort());
$("tokens").addEventListener("input", showBudget);
$("tokens").addEventListener("change", () => state.url && look());
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
start();
