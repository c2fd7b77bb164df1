// The Python program that asks the same question.

// Strings of JSON.stringify are Python's, too.
const quote = JSON.stringify;

const WIDTH = 58;

// `picture` is a Python expression; null is the package's sample.
export function program(question, { about, picture }) {
  const sample = picture === null;
  const isPath = !sample && question.skill === "chat"; // in a message, a string would be text
  const image = sample ? "md.SAMPLE_IMAGE" : isPath ? `Path(${picture})` : picture;
  const isCloud = about.endpoint === "https://api.moondream.ai/v1";
  return [
    "import asyncio",
    isPath && "from pathlib import Path",
    "",
    "import moondream_async as md",
    "", "",
    "async def main():",
    ...indent(1, [
      isCloud && "# The key comes from MOONDREAM_API_KEY.",
      ...call("async with md.MoondreamClient", [
        !isCloud && `endpoint=${quote(about.endpoint)}`,
        about.model && `model=${quote(about.model)}`,
      ], " as client:", 1),
      ...indent(1, BODIES[question.skill](question, image)),
    ]),
    "", "",
    "asyncio.run(main())", "",
  ].filter((line) => line !== false).join("\n");
}

const BODIES = {
  caption: (question, image) => streamed("caption", [
    image, question.length !== "normal" && `length=${quote(question.length)}`,
  ], question),
  query: (question, image) => streamed("query", [image, quote(question.question)], question),
  segment: (question, image) => [
    ...streamed("segment", [image, quote(question.object)], question),
    "print(stream.bbox)  # 0-1 of the picture",
    "print(stream.path)  # 0-1 of the box",
  ],
  chat: (question, image) => [
    "messages = [",
    ...question.messages.flatMap(({ role, content }, index) => indent(1, [
      "{",
      ...indent(1, [
        `"role": ${quote(role)},`,
        `"content": ${index ? quote(content) : `[${quote(content)}, ${image}]`},`,
      ]),
      "},",
    ])),
    "]",
    ...streamed("chat", ["messages"], question),
  ],
  detect: (question, image) => found("detect", "objects", "box", image, question),
  point: (question, image) => found("point", "points", "point", image, question),
};

function streamed(skill, given, question) {
  const reasoning = question.reasoning && "reasoning=True";
  const options = [...given, reasoning, settings(question), "stream=True"];
  return [
    ...call(`stream = await client.${skill}`, options, "", 2),
    "async for chunk in stream.chunk:",
    '    print(chunk, end="", flush=True)',
    "print()",
  ];
}

function found(skill, key, one, image, question) {
  return [
    ...call(`result = await client.${skill}`, [image, quote(question.object), settings(question)], "", 2),
    `for ${one} in result.${key}:`,
    `    print(${one})`,
  ];
}

function settings(question) {
  const pairs = Object.entries(question.settings).map(([name, value]) => `${quote(name)}: ${value}`);
  return pairs.length > 0 && `settings={${pairs.join(", ")}}`;
}

// A call in one line, or, if the line would be too long, with a line for each argument.
function call(before, options, after, level) {
  const given = options.filter(Boolean);
  const line = `${before}(${given.join(", ")})${after}`;
  if (line.length + 4 * level <= WIDTH || given.length === 0) return [line];
  return [`${before}(`, ...indent(1, given.map((each) => `${each},`)), `)${after}`];
}

function indent(levels, lines) {
  return lines.map((line) => line && "    ".repeat(levels) + line);
}
