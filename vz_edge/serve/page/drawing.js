// Draws which tokens of a picture are kept. A patch is [tile number, patch number]; its token's position is one more,
// since CLS comes first.

const VEIL = 0.74; // how much of a patch that was not kept is hidden
const SELECTED = "#e0a100";
const RAMP = [[18, 10, 60], [110, 30, 110], [205, 70, 70], [245, 160, 50], [255, 240, 150]];

// The numbers of the tiles that a layer shows: the whole picture squeezed into the base tile, or the grid.
export function tilesOf(seen, layer) {
  if (!seen.grid) return [0];
  return layer === "base" ? [0] : seen.tiles.map((_, number) => number).slice(1);
}

// The part of the plane that holds the picture and the tiles: left, top, right, bottom in the picture's pixels.
export function extent(seen, numbers) {
  return around([[0, 0, seen.width, seen.height], ...numbers.map((number) => seen.tiles[number].box)]);
}

function around(boxes) {
  return [0, 1, 2, 3].map((side) => (side < 2 ? Math.min : Math.max)(...boxes.map((box) => box[side])));
}

// Of each contextual token the patch that others joined: evenly spaced among those that were not kept.
export function targets(seen, number) {
  const rest = seen.tiles[number].merged.flatMap((token, position) => (token < 0 ? [] : [position]));
  const stride = Math.floor(rest.length / seen.contextual);
  return rest.filter((_, index) => index % stride === 0).slice(0, seen.contextual);
}

// A colour of the attention ramp for 0 to 1.
export function heat(share, alpha = 1) {
  const place = share * (RAMP.length - 1);
  const below = Math.min(Math.floor(place), RAMP.length - 2);
  const mixed = RAMP[below].map((low, channel) => low + (place - below) * (RAMP[below + 1][channel] - low));
  return `rgb(${mixed.map(Math.round).join(" ")} / ${alpha})`;
}

// The most that CLS attends to a patch, of all tiles of the picture, so that they can be compared.
export function mostAttention(seen) {
  return Math.max(...seen.tiles.flatMap((tile) => tile.attention));
}

// The patch under a point of the plane, or null.
export function patchAt(seen, numbers, x, y) {
  for (const number of numbers) {
    const [left, top, right, bottom] = seen.tiles[number].box;
    if (x < left || x >= right || y < top || y >= bottom) continue;
    const side = seen.patches_per_side;
    const column = Math.floor(((x - left) / (right - left)) * side);
    return [number, Math.floor(((y - top) / (bottom - top)) * side) * side + column];
  }
  return null;
}

export function patchBox(seen, [number, patch]) {
  const [left, top, right, bottom] = seen.tiles[number].box;
  const side = seen.patches_per_side;
  const [width, height] = [(right - left) / side, (bottom - top) / side];
  return [left + (patch % side) * width, top + Math.floor(patch / side) * height, width, height];
}

// Two strokes that show on any picture: a wide one of the paper, a narrow one of the ink.
function pencil(context, ratio, paper, ink) {
  return (path, width, colour = ink) => {
    context.strokeStyle = paper;
    context.lineWidth = 2.5 * width * ratio;
    context.stroke(path);
    context.strokeStyle = colour;
    context.lineWidth = width * ratio;
    context.stroke(path);
  };
}

// Draw into a canvas as wide as it is shown. `view` is dominant, contextual, attention or picture.
export function draw(canvas, picture, seen, { view, layer, selected }) {
  const numbers = tilesOf(seen, layer);
  const [left, top, right, bottom] = extent(seen, numbers);
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round((canvas.width * (bottom - top)) / (right - left));
  const scale = canvas.width / (right - left);
  const style = getComputedStyle(canvas);
  const [paper, ink, padding] = ["--paper", "--ink", "--line"].map((name) => style.getPropertyValue(name).trim());
  const context = canvas.getContext("2d");
  const stroke = pencil(context, ratio, paper, ink);
  const rectangle = (x, y, width, height) => {
    const [x0, y0] = [Math.round((x - left) * scale), Math.round((y - top) * scale)];
    return [x0, y0, Math.round((x + width - left) * scale) - x0, Math.round((y + height - top) * scale) - y0];
  };

  context.fillStyle = padding;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, ...rectangle(0, 0, seen.width, seen.height));
  veilUnseen(context, seen, numbers, rectangle, paper);
  const fill = filler(seen, view, paper);
  for (const number of numbers) {
    const kept = new Set(seen.tiles[number].kept ?? []);
    for (let patch = 0; patch < seen.patches_per_side ** 2; patch++) {
      const painted = fill(number, patch, kept.has(patch + 1));
      if (!painted) continue;
      context.fillStyle = painted;
      context.fillRect(...rectangle(...patchBox(seen, [number, patch])));
    }
    if (view === "contextual") markTargets(context, seen, number, rectangle);
    if (view !== "picture") stroke(outline(seen, number, kept, rectangle), 1);
  }
  context.setLineDash([5 * ratio, 3 * ratio]);
  for (const number of numbers) stroke(tileBorder(seen, number, rectangle), 1);
  context.setLineDash([]);
  if (!selected) return;
  if (view === "contextual") stroke(mergedWith(seen, selected, rectangle), 1.5);
  const patch = new Path2D();
  patch.rect(...rectangle(...patchBox(seen, selected)));
  stroke(patch, 2.5, SELECTED);
}

// The colour to lay over a patch, or null.
function filler(seen, view, paper) {
  const veil = `color-mix(in srgb, ${paper} ${100 * VEIL}%, transparent)`;
  if (view === "dominant") return (number, patch, kept) => (kept ? null : veil);
  if (view === "attention") {
    const most = mostAttention(seen);
    return (number, patch) => heat(Math.sqrt(seen.tiles[number].attention[patch] / most), 0.78);
  }
  if (view === "contextual") {
    return (number, patch) => {
      const token = seen.tiles[number].merged[patch + 1];
      return token < 0 ? null : tokenColour(token, 0.62);
    };
  }
  return () => null;
}

// Neighbouring numbers get hues far apart (the golden angle).
function tokenColour(token, alpha) {
  return `hsl(${(token * 137.5) % 360} 60% 52% / ${alpha})`;
}

// Veil what no tile shows: a stock LLaVA-1.5 sees the centre alone.
function veilUnseen(context, seen, numbers, rectangle, paper) {
  const path = new Path2D();
  path.rect(0, 0, context.canvas.width, context.canvas.height);
  const [left, top, right, bottom] = around(numbers.map((number) => seen.tiles[number].box));
  path.rect(...rectangle(left, top, right - left, bottom - top));
  context.fillStyle = `color-mix(in srgb, ${paper} 85%, transparent)`;
  context.fill(path, "evenodd");
}

// Around the kept patches, where they border on others.
function outline(seen, number, kept, rectangle) {
  const side = seen.patches_per_side;
  const path = new Path2D();
  const edge = (x0, y0, x1, y1) => (path.moveTo(x0, y0), path.lineTo(x1, y1));
  for (const position of kept) {
    if (position === 0) continue;
    const patch = position - 1;
    const [x, y, width, height] = rectangle(...patchBox(seen, [number, patch]));
    const column = patch % side;
    if (column === 0 || !kept.has(position - 1)) edge(x, y, x, y + height);
    if (column === side - 1 || !kept.has(position + 1)) edge(x + width, y, x + width, y + height);
    if (patch < side || !kept.has(position - side)) edge(x, y, x + width, y);
    if (patch >= side * (side - 1) || !kept.has(position + side)) edge(x, y + height, x + width, y + height);
  }
  return path;
}

// Right and lower side alone, since tiles share the others; the canvas ends where the first ones begin.
function tileBorder(seen, number, rectangle) {
  const [left, top, right, bottom] = seen.tiles[number].box;
  const [x, y, width, height] = rectangle(left, top, right - left, bottom - top);
  const path = new Path2D();
  path.moveTo(x + width, y);
  path.lineTo(x + width, y + height);
  path.moveTo(x, y + height);
  path.lineTo(x + width, y + height);
  return path;
}

function markTargets(context, seen, number, rectangle) {
  for (const position of targets(seen, number)) {
    const [x, y, width, height] = rectangle(...patchBox(seen, [number, position - 1]));
    context.beginPath();
    context.arc(x + width / 2, y + height / 2, Math.max(2, Math.min(width, height) * 0.28), 0, 2 * Math.PI);
    context.fillStyle = tokenColour(seen.tiles[number].merged[position], 1);
    context.fill();
    context.strokeStyle = "#fff";
    context.stroke();
  }
}

// Around all patches that went into the same contextual token as one of them.
function mergedWith(seen, [number, patch], rectangle) {
  const { merged } = seen.tiles[number];
  const token = merged[patch + 1];
  const together = merged.flatMap((other, position) => (token >= 0 && other === token ? [position] : []));
  return outline(seen, number, new Set(together), rectangle);
}
