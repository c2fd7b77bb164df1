// Advice for each kind of error, as the Python client names the kinds.

const AGAIN = "Ask again.";
const BUSY = "Wait a few seconds, then ask again.";

const REMEDIES = {
  AuthenticationError: "Set MOONDREAM_API_KEY to your key in the terminal, and start the page again there.",
  PermissionDeniedError: "The key may not do this. Look at its account at moondream.ai, or set another in MOONDREAM_API_KEY and start the page again.",
  NotFoundError: "The server doesn’t have this. Is its address right, /v1 at its end included, and the name of the model?",
  PayloadTooLargeError: "Choose a smaller picture.",
  TooLarge: "Choose a smaller picture.",
  RateLimitError: BUSY,
  ServerError: BUSY,
  StreamServerError: AGAIN,
  StreamInterruptedError: AGAIN,
  StreamProtocolError: "Ask again. If it happens each time, this is no server that speaks Moondream’s API.",
  StreamStalledError: "Ask again. A busy server may need more time: start the page with --timeout.",
  APITimeoutError: "Ask again. A busy server may need more time: start the page with --timeout.",
  ImageError: "Choose another picture: JPEG, PNG, WebP and GIF are sure to work.",
  BadRequestError: "Change what is asked, or the settings, and ask again.",
  RequestError: "Change what is asked, or the settings, and ask again.",
  Refused: "Open the page by the address that the terminal shows.",
  OwnServer: "Start it again with “moondream-async demo --web”, then reload this page.",
  Camera: "Allow this page the camera, beside its address, or choose a picture or a video instead.",
  Picture: "Choose a JPEG, PNG, WebP or GIF, or a video.",
};

export function remedy(type, endpoint) {
  if (type === "APIConnectionError") {
    return endpoint === "https://api.moondream.ai/v1"
      ? "Look whether this machine is connected to the internet, then ask again."
      : `Look whether the server at ${endpoint} runs. To try without one: moondream-async serve`;
  }
  return REMEDIES[type] ?? "";
}
