// The server's API: the model's name, and streamed answers.

import { EventSourceParserStream } from "./vendor/eventsource-parser/stream.js";

/** A problem with a sentence for the reader. */
export class Problem extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function call(path, key, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached. Is it running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Problem(sentence(body?.error, response), response.status);
}

function sentence(error, response) {
  if (response.status === 401) return "This server needs an API key: enter it in the settings.";
  if (response.status === 429) return "The server is busy. Try again in a moment.";
  const text = error?.message ?? `The server answered with status ${response.status}.`;
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

/** The model that the server runs. */
export async function getModel(key) {
  return (await (await call("/v1/models", key)).json()).data[0];
}

/** Ask, and get parts of the answer as they come: {text}, {reason} or {usage}. */
export async function* ask(body, key, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await call("/v1/chat/completions", key, {
    method: "POST",
    body: JSON.stringify(request),
    signal,
  });
  let finished = false;
  try {
    const events = response.body.pipeThrough(new TextDecoderStream()).pipeThrough(new EventSourceParserStream());
    const reader = events.getReader();
    for (let next = await reader.read(); !next.done && next.value.data !== "[DONE]"; next = await reader.read()) {
      const chunk = JSON.parse(next.value.data);
      if (chunk.error) throw new Problem(sentence(chunk.error, response));
      const choice = chunk.choices[0];
      if (choice?.delta.content) yield { text: choice.delta.content };
      if (choice?.finish_reason) {
        finished = true;
        yield { reason: choice.finish_reason };
      }
      if (chunk.usage) yield { usage: chunk.usage };
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Problem) throw error;
    throw new Problem("The connection was lost before the answer ended.");
  }
  if (!finished) throw new Problem("The connection was lost before the answer ended.");
}
