// Keeps the form, the conversation and the picture when the page is reloaded, until the tab closes.

import { smaller } from "./frames.js";

const FORM = "asked";
const PICTURE = "picture";

export function keep(fields, turns) {
  const values = [];
  for (const field of fields) {
    const isChoice = ["radio", "checkbox"].includes(field.type);
    if (field.name && !isChoice) values.push([field.name, field.value]);
    else if (field.name && field.checked) values.push([field.name, field.value]);
  }
  store(FORM, { values, turns });
}

// Fill in the form as it was; return the turns of the conversation.
export function fillIn(fields) {
  const { values = [], turns = [] } = restore(FORM) ?? {};
  for (const field of fields) {
    if (values.length && field.type === "checkbox") field.checked = false;
  }
  for (const [name, value] of values) {
    const field = fields.namedItem(name);
    if (field?.type === "checkbox") field.checked = true;
    else if (field) field.value = value;
  }
  return turns;
}

// A tab can keep some megabytes: a larger picture is kept at a smaller size.
export async function keepPicture(blob, name) {
  sessionStorage.removeItem(PICTURE);
  if (store(PICTURE, { name, url: await dataUrl(blob) })) return;
  const image = await createImageBitmap(blob);
  store(PICTURE, { name, url: await dataUrl(await smaller(image, image.width, image.height, 1600)) });
}

export async function keptPicture() {
  const { name, url } = restore(PICTURE) ?? {};
  if (!url) return null;
  const [head, data] = url.split(",");
  const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
  return { name, blob: new Blob([bytes], { type: head.slice(5).split(";")[0] }) };
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

function store(key, value) {
  try {
    sessionStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false; // the storage is full or forbidden, and a reload forgets the value
  }
}

function restore(key) {
  try {
    return JSON.parse(sessionStorage.getItem(key));
  } catch {
    return null;
  }
}
