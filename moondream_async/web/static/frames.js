// Frames of a camera or of a video file.

const MOST_PIXELS_A_SIDE = 1280; // more than the model looks at

export function openCamera() {
  if (!navigator.mediaDevices) throw new Error("this browser shows pages no camera");
  return navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
}

export function closeCamera(video) {
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
}

// Return a video's present frame as a JPEG.
export function frame(video, side = MOST_PIXELS_A_SIDE) {
  return smaller(video, video.videoWidth, video.videoHeight, side);
}

// Return a picture as a JPEG whose longer side is at most so many pixels.
export function smaller(source, width, height, side) {
  const scale = Math.min(1, side / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("It can’t be made a JPEG."))),
      "image/jpeg", 0.88);
  });
}

// Wait for a video's next frame; return its time.
export function nextFrame(video, signal) {
  return new Promise((resolve, reject) => {
    const end = () => {
      video.cancelVideoFrameCallback(handle);
      reject(signal.reason);
    };
    const handle = video.requestVideoFrameCallback((now) => {
      signal.removeEventListener("abort", end);
      resolve(now);
    });
    if (signal.aborted) end();
    signal.addEventListener("abort", end, { once: true });
  });
}
