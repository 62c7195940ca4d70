// Llama-2's token ids by an encoder that shares no code with the workbook: llama-tokenizer-js (MIT), of npm.
//
//     npm pack llama-tokenizer-js@1.2.2 && tar xf llama-tokenizer-js-1.2.2.tgz
//     node tests/upstream/llama2_ids.mjs package [FOLDER]
//
// It encodes each conversation of tests/unit/models/llama2_ids.jsonl as chat_completion of Meta's llama repository does
// and compares the ids with those in the file; with --write they are written there. With FOLDER, the vocabulary is
// written as a tokenizer into FOLDER/llama-2, where tests find it: WORKBOOK_TOKENIZERS=FOLDER. The vocabulary is under
// the Llama 2 Community License and may not be committed.
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

const [unpacked, ...rest] = process.argv.slice(2);
const write = rest.includes("--write");
const folder = rest.find((argument) => argument !== "--write");
const file = join(dirname(fileURLToPath(import.meta.url)), "../unit/models/llama2_ids.jsonl");
const log = console.log;
console.log = () => {}; // the package greets
const { default: llama } = await import(pathToFileURL(join(resolve(unpacked), "llama-tokenizer.js")));

function reference(messages) {
  let [first, ...turns] = messages;
  if (first.role === "system") {
    turns[0] = { role: "user", content: `<<SYS>>\n${first.content}\n<</SYS>>\n\n${turns[0].content}` };
  } else {
    turns = messages;
  }
  const ids = [];
  for (let at = 0; at < turns.length; at += 2) {
    const question = `[INST] ${turns[at].content.trim()} [/INST]`;
    const reply = turns[at + 1];
    // Meta's encoder: the begin token, the text as a sequence of its own, and after a reply the end token.
    ids.push(1, ...llama.encode(reply ? `${question} ${reply.content.trim()} ` : question, false, true));
    if (reply) ids.push(2);
  }
  return ids;
}

const conversations = readFileSync(file, "utf8").trim().split("\n").map((line) => JSON.parse(line));
let different = 0;
for (const conversation of conversations) {
  const ids = reference(conversation.messages);
  if (JSON.stringify(ids) !== JSON.stringify(conversation.ids)) different += 1;
  conversation.ids = ids;
}
if (write) writeFileSync(file, conversations.map((conversation) => JSON.stringify(conversation) + "\n").join(""));
log(`${conversations.length} conversations, ${different} with other ids than in the file`);

if (folder) {
  const out = join(folder, "llama-2");
  mkdirSync(out, { recursive: true });
  const special = ["<unk>", "<s>", "</s>"];
  const flags = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
  const tokenizer = {
    version: "1.0",
    added_tokens: special.map((content, id) => ({ id, content, ...flags })),
    normalizer: {
      type: "Sequence",
      normalizers: [{ type: "Prepend", prepend: "▁" }, { type: "Replace", pattern: { String: " " }, content: "▁" }],
    },
    post_processor: {
      type: "TemplateProcessing",
      single: [{ SpecialToken: { id: "<s>", type_id: 0 } }, { Sequence: { id: "A", type_id: 0 } }],
      pair: [{ Sequence: { id: "A", type_id: 0 } }, { Sequence: { id: "B", type_id: 1 } }],
      special_tokens: { "<s>": { id: "<s>", ids: [1], tokens: ["<s>"] } },
    },
    decoder: {
      type: "Sequence",
      decoders: [
        { type: "Replace", pattern: { String: "▁" }, content: " " },
        { type: "ByteFallback" },
        { type: "Fuse" },
        { type: "Strip", content: " ", start: 1, stop: 0 },
      ],
    },
    model: {
      type: "BPE",
      unk_token: "<unk>",
      fuse_unk: true,
      byte_fallback: true,
      vocab: Object.fromEntries(llama.vocabById.map((piece, id) => [piece, id])),
      merges: [...llama.merges.keys()],
    },
  };
  const config = { tokenizer_class: "LlamaTokenizer", add_bos_token: true, add_eos_token: false, legacy: false };
  Object.assign(config, { bos_token: "<s>", eos_token: "</s>", unk_token: "<unk>" });
  writeFileSync(join(out, "tokenizer.json"), JSON.stringify(tokenizer));
  writeFileSync(join(out, "tokenizer_config.json"), JSON.stringify(config));
  log(`${llama.vocabById.length} pieces in ${out}`);
}
process.exit(different && !write ? 1 : 0);
