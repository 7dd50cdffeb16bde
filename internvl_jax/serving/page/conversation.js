// The conversation, and its place in the browser's storage, which outlives a reload.
//
// A turn is {question, images: [{name, url}], answer, error, note, done}; images are data: URIs.

const DATABASE = "internvl-jax";

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations");
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function inStore(mode, action) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction("conversations", mode);
      const request = action(transaction.objectStore("conversations"));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

/** The turns of the last visit. A turn that was cut off by the reload says so. */
export async function restore() {
  const turns = (await inStore("readonly", (store) => store.get("turns"))) ?? [];
  for (const turn of turns) {
    if (!turn.done) Object.assign(turn, { done: true, error: "The page was reloaded before the answer ended." });
  }
  return turns;
}

/** Keep the turns. */
export function keep(turns) {
  return inStore("readwrite", (store) => store.put(turns, "turns"));
}

/** The messages of the API: all answered turns, and the last one. */
export function messages(turns) {
  const list = [];
  turns.forEach((turn, number) => {
    const last = number === turns.length - 1;
    if (!turn.answer && !last) return; // shown as left out
    const images = turn.images.map((image) => ({ type: "image_url", image_url: { url: image.url } }));
    list.push({ role: "user", content: [...images, { type: "text", text: turn.question }] });
    if (turn.answer && !(last && !turn.done)) list.push({ role: "assistant", content: turn.answer });
  });
  return list;
}

/** Let the reader save the conversation as a file, in the API's form. */
export function download(turns, model) {
  const text = JSON.stringify({ model, messages: messages(turns) }, null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
