// Example questions, about the sample picture and about any other.

const OF_THE_SAMPLE = {
  query: ["How many coloured shapes are there?", "Where is the yellow sun?", "How bright is it?"],
  object: ["red circle", "yellow sun", "shape"],
  chat: ["Which colours are in this picture?", "Where is something blue?"],
};
const OF_ANY = {
  query: ["What is in this picture?", "How many people are there?", "What does the text say?"],
  object: ["person", "face", "car", "text"],
  chat: ["What is going on here?", "What is unusual about it?"],
};
const FIELDS = { query: "question", detect: "object", point: "object", segment: "object", chat: "message" };

export function examples(skill, isSample) {
  const known = isSample ? OF_THE_SAMPLE : OF_ANY;
  const field = FIELDS[skill];
  return { field, questions: known[field === "object" ? "object" : skill] ?? [] };
}
