// Moving pictures. The newest frame wins: one question is under way at a time, and the next
// frame is taken when its answer has come. Frames in between are neither encoded nor sent, so
// that an answer is only as old as its call, also with a slow server.

import { closeCamera, frame, nextFrame, openCamera } from "./frames.js";
import { fault } from "./picture.js";
import { seconds } from "./shown.js";

const $ = (id) => document.getElementById(id);
const WINDOW = 12; // answers, for the speed
const PAUSE = 1000; // milliseconds after an error

// Errors that the next frame would have as well.
const LASTING = new Set([
  "AuthenticationError", "PermissionDeniedError", "NotFoundError", "BadRequestError",
  "RequestError", "ImageError", "Refused",
]);

const video = $("moving");
let address = null; // the video file's
let still = ""; // the still picture's caption

// Show the camera, or a video file, and call `answer(blob, signal, drawn)` for frame after frame
// until the signal aborts or the tab is hidden; `answer` calls `drawn` when the answer is shown.
// Returns the reason of the end.
export async function live({ file, signal, answer, complain, started }) {
  const ends = new AbortController();
  const end = (why) => ends.abort(why);
  const stopped = () => end("Stopped");
  const hidden = () => document.hidden && end("Stopped: the tab was hidden");
  signal.addEventListener("abort", stopped, { once: true });
  document.addEventListener("visibilitychange", hidden);
  try {
    await open(file, end);
    if (!ends.signal.aborted) {
      started();
      show(file?.name ?? "What the camera sees");
      await ask(ends, answer, complain);
    }
  } catch (error) {
    if (!ends.signal.aborted) throw error;
  } finally {
    signal.removeEventListener("abort", stopped);
    document.removeEventListener("visibilitychange", hidden);
    close();
    show(null);
  }
  return ends.signal.reason;
}

async function ask({ signal }, answer, complain) {
  const answered = [];
  while (!signal.aborted) {
    const taken = await nextFrame(video, signal);
    try {
      await answer(await frame(video), signal, () => {
        answered.push(performance.now());
        if (answered.length > WINDOW) answered.shift();
        tell(performance.now() - taken, answered);
      });
      complain(null);
    } catch (error) {
      if (signal.aborted) return;
      if (LASTING.has(error.type) || error instanceof TypeError) throw error;
      complain(error); // the next frame may succeed
      await pause(signal);
    }
  }
}

async function open(file, end) {
  try {
    if (file) {
      address = URL.createObjectURL(file);
      video.src = address;
    } else {
      video.srcObject = await openCamera();
      for (const track of video.srcObject.getTracks()) {
        track.addEventListener("ended", () => end("Stopped: the camera is gone"));
      }
    }
    await video.play();
  } catch (error) {
    if (file) throw fault("Picture", `${file.name} is no video that this browser can show.`);
    throw fault("Camera", `There is no camera to look through: ${error.message}.`);
  }
  $("frame").style.setProperty("--ratio", video.videoWidth / video.videoHeight);
}

function close() {
  video.pause();
  closeCamera(video);
  if (!address) return;
  video.removeAttribute("src");
  video.load();
  URL.revokeObjectURL(address);
  address = null;
}

// Show the moving picture with its name; null shows the still picture again.
function show(name) {
  const caption = $("picture-name");
  if (name !== null) [still, caption.textContent] = [caption.textContent, name];
  else if (still) [still, caption.textContent] = ["", still];
  video.hidden = $("pulse").hidden = name === null;
  $("picture").hidden = name !== null;
  $("age").textContent = "no answer yet";
  $("speed").textContent = "";
  const image = $("picture");
  if (name === null) $("frame").style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
}

function tell(age, answered) {
  const spread = (answered.at(-1) - answered[0]) / 1000;
  $("age").textContent = `${seconds(age)} old`;
  $("speed").textContent = spread ? `${((answered.length - 1) / spread).toFixed(1)} frames/s` : "";
}

function pause(signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, PAUSE);
    signal.addEventListener("abort", () => resolve(clearTimeout(timer)), { once: true });
  });
}
