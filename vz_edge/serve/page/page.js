// What all parts of the page share.

export const $ = (id) => document.getElementById(id);

export const state = {
  model: null, // what /ui/model says
  picture: null, // as it is drawn
  url: null, // as it is sent
  seen: null, // what /ui/look says of it
  view: "dominant",
  layer: "grid",
  selected: null, // a patch: [tile number, patch number]
};

// The budget that is chosen; undefined where there is no choice.
export function budget() {
  const budgets = state.model?.budgets ?? [];
  return budgets.length < 2 ? undefined : budgets.toSorted((one, other) => one - other)[$("tokens").value];
}

// A problem with the page as a whole, or null where it is over. An aborted request is none.
export function tell(error) {
  if (error?.name === "AbortError") return;
  $("problem").textContent = error ? error.message : "";
  $("problem").hidden = !error;
  if (error) $("problem").scrollIntoView({ block: "nearest" });
}

export const askForToken = () => ($("token-form").hidden = false);

export const sec = (seconds) => (seconds < 1 ? `${(1000 * seconds).toFixed(0)} ms` : `${seconds.toFixed(2)} s`);
export const rate = (tokens, seconds) => (tokens / seconds).toFixed(tokens / seconds < 100 ? 1 : 0);
export const percent = (share) => `${(100 * share).toPrecision(2)} %`;
