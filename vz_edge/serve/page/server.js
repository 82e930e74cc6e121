// What the page asks of the server, and how a refusal is told: always as a sentence.

const TOKEN = "vz-edge token";

export class Refusal extends Error {}

export const hasToken = () => sessionStorage.getItem(TOKEN) !== null;
export const keepToken = (token) => sessionStorage.setItem(TOKEN, token);

// The response of a GET, or of a POST where there is a body. `refused` is called where a token is missing or wrong.
export async function send(path, body, signal, refused = () => {}) {
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
  if (response.status === 401) refused();
  const told = await response.json().catch(() => null);
  throw new Refusal(told?.error?.message ?? `The server answered with status ${response.status}.`);
}

// The server-sent events of a response, until "[DONE]". An event with an error, and an end without one, are refusals.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Refusal("The connection broke off before the answer's end.");
    });
    if (done) throw new Refusal("The server ended before the answer's end.");
    const whole = (text + value).split("\n\n");
    text = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new Refusal(parsed.error.message);
      yield parsed;
    }
  }
}
