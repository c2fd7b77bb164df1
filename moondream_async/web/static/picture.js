// The picture of the questions: chosen, dropped, pasted or photographed.

import { closeCamera, frame as photo, openCamera } from "./frames.js";

const frame = document.getElementById("frame");
const image = document.getElementById("picture");
const caption = document.getElementById("picture-name");

// An error of a kind that `remedies.js` knows.
export function fault(type, message) {
  return Object.assign(new Error(message), { type });
}

export const picture = { blob: null, name: "", source: null };

// Show a picture, or throw an error with a sentence. `source` is its Python expression.
export async function show(blob, name, { source = null, maxBytes = Infinity } = {}) {
  if (blob.size > maxBytes) {
    throw fault("TooLarge", `${name} has ${megabytes(blob.size)} MB; up to ${megabytes(maxBytes)} MB can be sent.`);
  }
  const url = URL.createObjectURL(blob);
  try {
    const trial = new Image();
    trial.src = url;
    await trial.decode();
  } catch {
    URL.revokeObjectURL(url);
    throw fault("Picture", `${name} is no picture that this browser can show.`);
  }
  const before = image.src;
  image.src = url;
  await image.decode();
  if (before) URL.revokeObjectURL(before);
  frame.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  image.alt = `The picture that you ask about: ${name}`;
  caption.textContent = `${name}, ${image.naturalWidth} × ${image.naturalHeight}`;
  Object.assign(picture, { blob, name, source });
}

// Call `take(blob, name)` for each picture or video of the user, and `refuse(error)` for
// anything else.
export function watchSources(take, refuse) {
  for (const [button, input] of [["choose", "file"], ["photograph", "capture"]]) {
    const field = document.getElementById(input);
    field.addEventListener("change", () => {
      if (field.files[0]) take(field.files[0], field.files[0].name);
      field.value = ""; // so that the same file can be chosen again
    });
    if (button === "choose") {
      document.getElementById(button).addEventListener("click", () => field.click());
    }
  }
  watchCamera(take, refuse);
  document.addEventListener("paste", (event) => {
    const file = event.clipboardData.files[0];
    if (!file) return; // text, for the field that has the focus
    event.preventDefault();
    take(file, file.name);
  });
  watchDrops(take, refuse);
}

function watchDrops(take, refuse) {
  let depth = 0; // of nested elements: each has an event for entering and for leaving
  const mark = (change) => {
    depth = Math.max(0, depth + change);
    document.body.classList.toggle("dropping", depth > 0);
  };
  document.addEventListener("dragenter", () => mark(1));
  document.addEventListener("dragleave", () => mark(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    mark(-Infinity);
    const file = event.dataTransfer.files[0];
    if (file) take(file, file.name);
    else refuse(fault("", "That was no file. Save the picture first, or copy it and paste it here."));
  });
}

// A phone takes a photo with its own app; elsewhere, the page shows the camera.
function watchCamera(take, refuse) {
  const dialog = document.getElementById("camera");
  const video = dialog.querySelector("video");
  const hasApp = matchMedia("(pointer: coarse)").matches || !navigator.mediaDevices;
  document.getElementById("photograph").addEventListener("click", async () => {
    if (hasApp) {
      document.getElementById("capture").click();
      return;
    }
    try {
      video.srcObject = await openCamera();
      dialog.showModal();
      await video.play();
    } catch (error) {
      closeCamera(video);
      refuse(fault("Camera", `No photo could be taken: ${error.message}.`));
    }
  });
  document.getElementById("shoot").addEventListener("click", async () => {
    const taken = await photo(video, Infinity);
    dialog.close();
    take(taken, "photo.jpg");
  });
  document.getElementById("close-camera").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => closeCamera(video)); // Escape closes it, too
}

function megabytes(bytes) {
  return Math.round(bytes / 2 ** 20);
}
