"""Write story_endings.jsonl and short_facts.jsonl, the items of two tasks for EleutherAI's lm-evaluation-harness.

    python notebooks/data/make_tasks.py

Story endings: which sentence comes next in a story, the true one or one with the same number of words from another
story? No model of this project was trained on these stories (env/models/falcon-mini/held_out.jsonl). Short facts: two
sentences share their two endings, and each ending is right for one of them, so a mere preference for a word scores one
half. The right option is first and second equally often, also among the first items. The same texts give the same
files.
"""

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
STORIES = HERE.parents[1] / "env/models/falcon-mini/held_out.jsonl"
BEFORE = 3  # sentences that are shown
WORDS = range(5, 21)  # of an option
# One sentence and its ending, another one and its ending.
FACTS = """
Ice is very | cold | Fire is very | hot
In the night the sky is | dark | In the day the sky is | light
A stone feels | hard | A bed feels | soft
A baby is very | young | A grandmother is very | old
A mountain is very | big | An ant is very | small
A feather is | light | A big rock is | heavy
Candy tastes | sweet | A lemon tastes | sour
After a bath you are | clean | After you play in the mud you are | dirty
In the rain you get | wet | In the sun your wet clothes get | dry
A turtle walks | slow | A race car drives | fast
When you win a prize you feel | happy | When you lose your toy you feel | sad
When you find a gift you | smile | When you fall and hurt your knee you | cry
At night you go to | bed | In the morning you go to | school
You see with your | eyes | You hear with your | ears
You smell with your | nose | You talk with your | mouth
You hold a cup with your | hand | You kick a ball with your | foot
You wear a hat on your | head | You wear shoes on your | feet
You wear gloves on your | hands | You wear socks on your | feet
A bird flies in the | sky | A fish swims in the | water
Birds live in a | nest | People live in a | house
A dog likes to | bark | A bird likes to | sing
A cat drinks | milk | A car needs | gas
You write a letter with a | pen | You eat cake with a | fork
You read a | book | You drink a cup of | tea
You sleep in a | bed | You sit on a | chair
You bake bread in an | oven | You keep milk cold in a | fridge
A doctor helps people who are | sick | A teacher helps children | learn
A baker makes | bread | A farmer grows | vegetables
A pilot flies a | plane | A driver drives a | bus
A chef works in a | kitchen | A doctor works in a | hospital
A boat goes on the | water | A train goes on the | tracks
The moon shines at | night | The sun shines during the | day
In winter there is | snow | In spring there are | flowers
When it is dark you turn on the | light | When you are thirsty you drink | water
When you are hungry you want to | eat | When you are tired you want to | sleep
When you are cold you put on a | coat | When you are hot you go for a | swim
When it is windy you fly a | kite | When it snows you make a | snowman
When you meet a friend you say | hello | When you leave you say | goodbye
When someone gives you a gift you say | thank you | When you make a mistake you say | sorry
You get gifts on your | birthday | You look for shells at the | beach
A clock tells the | time | A map shows the | way
You open the door with a | key | You brush your teeth with a | toothbrush
A tree has many | leaves | A bird has two | wings
A car has four | wheels | A hand has five | fingers
An apple grows on a | tree | A potato grows in the | ground
You buy food at the | store | You play on the swings at the | park
A puppy is a baby | dog | A kitten is a baby | cat
Two and one make | three | Two and two make | four
After the rain you can see a | rainbow | At night you can see many | stars
Fish live in the | sea | Bears live in the | forest
A knife is | sharp | A ball is | round
A whisper is | quiet | Thunder is | loud
A giant is very | tall | A mouse is very | small
A king lives in a | castle | A farmer lives on a | farm
A hero is | brave | A coward is | afraid
You water the | plants | You wash the | dishes
A bee makes | honey | A hen lays | eggs
The sun is very | bright | A cave is very | dark
Your mother's mother is your | grandma | Your father's father is your | grandpa
A boy grows up to be a | man | A girl grows up to be a | woman
The wife of a king is a | queen | The son of a king is a | prince
You eat breakfast in the | morning | You eat dinner in the | evening
Summer is | warm | Winter is | cold
A snail is | slow | A rocket is | fast
A library has many | books | A garden has many | flowers
A toy shop sells | toys | A bakery sells | bread
Cheese is made from | milk | Juice is made from | fruit
In the pool you can | swim | In bed you can | sleep
A joke makes you | laugh | A sad story makes you | cry
When you are sick you stay in | bed | When you are well you play | outside
A rock is | hard | Butter is | soft
One and one make | two | Five and five make | ten
A triangle has | three sides | A square has | four sides
Smoke comes from a | fire | Rain comes from a | cloud
A farmer works on a | farm | A teacher works in a | school
A firefighter puts out | fires | A painter paints | pictures
A sailor sails on the | sea | A pilot flies in the | sky
A postman brings | letters | A waiter brings | food
A rabbit can | hop | A fish can | swim
Cows eat | grass | Mice eat | cheese
A spider makes a | web | A bird makes a | nest
A tree is | tall | Grass is | short
Ice cream is | cold | Soup is | hot
You eat with your | mouth | You walk with your | legs
A broken toy can be | fixed | A dirty shirt can be | washed
A seed grows into a | plant | A puppy grows into a | dog
A caterpillar becomes a | butterfly | A tadpole becomes a | frog
When you turn off the light it is | dark | When you turn on the light it is | bright
"""


def sentences(text: str) -> list[str]:
    """The sentences of a story, cut if an end mark is followed by a space and a capital or a quote."""
    return re.split(r'(?<=[.!?"])\s+(?=[A-Z"])', " ".join(text.split()))


def usable(sentence: str) -> bool:
    """Whether a sentence may be an option: of common length, and with quotation marks that close."""
    return len(sentence.split()) in WORDS and sentence.count('"') % 2 == 0


def story_items(stories: Sequence[str]) -> Iterable[dict]:
    """Pair the last usable sentence of each story, then one from its middle, with a sentence of another story.

    A position is usable if all quotation marks before it are closed, so that neither option stands out by its form.
    """
    parts = [sentences(story) for story in stories]
    places = [
        [
            place
            for place in range(BEFORE, len(part))
            if usable(part[place]) and " ".join(part[place - BEFORE : place]).count('"') % 2 == 0
        ]
        for part in parts
    ]
    rng = random.Random(0)
    for last in (True, False):
        for story, part in enumerate(parts):
            if len(places[story]) < 2:
                continue
            place = places[story][-1 if last else (len(places[story]) - 1) // 2]
            right = part[place]
            words = len(right.split())
            others = [
                parts[other][where]
                for other, found in enumerate(places)
                for where in found
                if other != story and len(parts[other][where].split()) == words and parts[other][where] not in part
            ]
            yield {
                "story": story,
                "text": " ".join(part[place - BEFORE : place]),
                "right": right,
                "wrong": rng.choice(others),
            }


def fact_items() -> Iterable[dict]:
    """The first sentences of all pairs, then the second ones, so that the two of a pair are not neighbours."""
    pairs = [[part.strip() for part in line.split("|")] for line in FACTS.strip().splitlines()]
    for text, right, _, wrong in pairs:
        yield {"text": text, "right": right, "wrong": wrong}
    for _, wrong, text, right in pairs:
        yield {"text": text, "right": right, "wrong": wrong}


def keyed(items: Iterable[dict], kind: str) -> Iterable[dict]:
    """The items with a number and their options in order: the right one first, then second, in turn."""
    for number, item in enumerate(items):
        pair = [item.pop("right"), item.pop("wrong")]
        answer = number % 2
        yield {"id": f"{kind}-{number + 1:03}", **item, "options": pair[::-1] if answer else pair, "answer": answer}


def write(name: str, rows: Iterable[dict]) -> None:
    """One JSON object per line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (HERE / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Write the two files."""
    stories = [json.loads(line)["text"] for line in STORIES.read_text(encoding="utf-8").splitlines()]
    write("story_endings.jsonl", keyed(story_items(stories), "story"))
    write("short_facts.jsonl", keyed(fact_items(), "fact"))


if __name__ == "__main__":
    main()
