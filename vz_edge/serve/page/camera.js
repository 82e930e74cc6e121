// The camera: a still of it is a picture like any other.

import { $, tell } from "./page.js";
import { Refusal } from "./server.js";

const REFUSALS = {
  NotAllowedError: "The camera was not allowed. Allow it for this page in the browser, or choose a picture.",
  NotFoundError: "This machine has no camera. Choose a picture instead.",
  NotReadableError: "The camera is in use by another program. Close that, or choose a picture.",
};

// `show(open)` is called when the camera's picture comes and goes.
export async function openCamera(show) {
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
  show(true);
  $("shoot").focus();
}

export function closeCamera(show) {
  $("video").srcObject?.getTracks().forEach((track) => track.stop());
  $("video").srcObject = null;
  show(false);
  $("camera").focus();
}

// What the camera sees now, as a JPEG.
export function still() {
  const canvas = new OffscreenCanvas($("video").videoWidth, $("video").videoHeight);
  canvas.getContext("2d").drawImage($("video"), 0, 0);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
}
