// A conversation about one picture: what was asked and answered is sent along with each further question.

import { $, askForToken, budget, rate, sec, state } from "./page.js";
import { events, Refusal, send } from "./server.js";
import { explain } from "./terms.js";

const SCHEMA = `{
  "type": "object",
  "properties": {
    "things": { "type": "integer", "minimum": 0, "maximum": 99 },
    "largest": { "type": "string", "maxLength": 24 }
  },
  "required": ["things", "largest"],
  "additionalProperties": false
}`;
const SCHEMA_NAME = "answer";

let turns = []; // messages of the user's and the model's, in turn, as they are sent
let begun = null; // the system prompt of the first turn: with another one a conversation begins
let answering = null; // the request for the answer that is being written

export const isAnswering = () => answering !== null;
export const stop = () => answering?.abort();

// Forget what was said; it stays on the page, marked as past.
export function beginAnew() {
  answering?.abort();
  turns = [];
  for (const item of $("answers").children) item.classList.add("past");
  showTurn();
}

export async function ask(question) {
  let format;
  try {
    format = responseFormat();
  } catch (error) {
    return tellForm(error.message);
  }
  tellForm("");
  const system = $("system").value.trim();
  if (turns.length && (system !== begun || !$("remember").checked)) beginAnew();
  begun = system;
  const asked = userMessage(question);
  const item = newItem(question);
  const request = (answering = new AbortController());
  busy(true);
  try {
    const sent = body(system, asked, format);
    const answer = await read(await send("/v1/chat/completions", sent, request.signal, askForToken), item);
    const cut = answer.finish === "length";
    finish(item, answer.text, format, cut);
    if (answering === request) turns.push(asked, { role: "assistant", content: answer.text });
  } catch (error) {
    const stopped = error.name === "AbortError";
    note(item, stopped ? "Stopped. It is not part of the conversation." : `Not answered: ${error.message}`, !stopped);
    if (!stopped && !(error instanceof Refusal)) console.error(error);
  } finally {
    item.querySelector(".text").classList.remove("waiting");
    if (answering === request) {
      answering = null;
      busy(false);
    }
  }
}

// The picture goes with the first question.
function userMessage(question) {
  const text = { type: "text", text: question };
  if (turns.length) return { role: "user", content: [text] };
  return { role: "user", content: [{ type: "image_url", image_url: { url: state.url } }, text] };
}

function body(system, asked, format) {
  return {
    model: state.model.name,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...turns, asked],
    tokens: budget(),
    stream: true,
    stream_options: { include_usage: true },
    response_format: format
      ? { type: "json_schema", json_schema: { name: SCHEMA_NAME, schema: format.schema } }
      : { type: "text" },
  };
}

// Null for text. Throws a Refusal where the fields do not say what they should.
function responseFormat() {
  const form = document.querySelector("[name=form]:checked").value;
  if (form === "text") return null;
  if (form === "choices") {
    const choices = [...new Set($("choices").value.split(",").map((choice) => choice.trim()).filter(Boolean))];
    if (choices.length < 2) throw new Refusal("Give two choices or more, separated by commas.");
    return { schema: { type: "string", enum: choices }, isChoice: true };
  }
  let schema;
  try {
    schema = JSON.parse($("schema").value);
  } catch (error) {
    throw new Refusal(`The schema is not JSON: ${error.message}.`);
  }
  if (schema === null || typeof schema !== "object" || Array.isArray(schema)) {
    throw new Refusal('The schema is no JSON object, such as {"type": "object"}.');
  }
  return { schema, isChoice: false };
}

async function read(response, item) {
  const text = item.querySelector(".text");
  let finish = null;
  for await (const event of events(response)) {
    const choice = event.choices[0];
    text.textContent += choice?.delta.content ?? "";
    finish = choice?.finish_reason ?? finish;
    if (event.timings) showTimings(item, event.timings, event.usage);
  }
  return { text: text.textContent, finish };
}

function newItem(question) {
  for (const term of $("answers").querySelectorAll("[data-term]")) term.tabIndex = -1; // the newest answer's will do
  $("answers").prepend($("answer").content.cloneNode(true));
  const item = $("answers").firstElementChild;
  item.querySelector(".question").textContent = question;
  item.querySelector(".text").classList.add("waiting");
  item.classList.toggle("first", turns.length === 0);
  explain(item);
  return item;
}

function finish(item, text, format, cut) {
  const shown = item.querySelector(".text");
  if (format?.isChoice && !cut) shown.textContent = JSON.parse(text);
  else shown.classList.toggle("json", format !== null);
  if (!text.trim()) {
    shown.classList.add("nothing");
    shown.textContent = "No words: the model ended its answer at once.";
  }
  if (cut) note(item, "Cut off: the answer reached the longest length that was asked for.", false);
}

function note(item, words, wrong) {
  const place = item.querySelector(".note");
  place.textContent = words;
  place.hidden = false;
  place.classList.toggle("warning", wrong);
}

function tellForm(words) {
  $("form-problem").textContent = words;
  $("form-problem").hidden = !words;
  if (words) $("options").open = true;
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  $("send").disabled = !state.seen;
  showTurn();
}

function showTurn() {
  const said = $("remember").checked ? turns.length / 2 : 0;
  $("turn").textContent = said === 1 ? "1 answer is sent along." : `${said} answers are sent along.`;
  $("turns").hidden = !said;
}

// The stages one after the other, on one scale from the question to the last token.
function showTimings(item, timings, usage) {
  const stages = [timings.preprocess_sec, timings.vision_sec, timings.prefill_sec, timings.decode_sec];
  const total = stages.reduce((sum, seconds) => sum + seconds, 0) || 1;
  const bars = item.querySelectorAll(".timings i");
  const values = item.querySelectorAll(".timings output");
  let before = 0;
  stages.forEach((seconds, index) => {
    bars[index].style.marginLeft = `${(100 * before) / total}%`;
    bars[index].style.width = `${(100 * seconds) / total}%`;
    values[index].textContent = sec(seconds);
    before += seconds;
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

$("schema").value = SCHEMA;
$("remember").addEventListener("change", showTurn);
for (const input of document.getElementsByName("form")) {
  input.addEventListener("change", () => {
    $("choices-field").hidden = input.value !== "choices";
    $("schema-field").hidden = input.value !== "schema";
    tellForm("");
  });
}
