// Images that the reader drops, pastes or picks.

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** Read files. Returns the images, and a sentence about those that are none, or "". */
export async function readImages(files) {
  const images = [], problems = [];
  for (const file of files) {
    const name = file.name || "pasted image";
    if (!TYPES.includes(file.type)) {
      problems.push(`${name} is not a PNG, JPEG, WebP, GIF or BMP image.`);
      continue;
    }
    try {
      images.push({ name, url: await dataUrl(file) });
    } catch {
      problems.push(`${name} cannot be read.`);
    }
  }
  return { images, problem: problems.join(" ") };
}
