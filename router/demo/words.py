"""Word lists and small facts from which `corpus.py` builds its sentences.

Everything here was written for Quire; nothing is copied from a data set.
"""

# Heroes of stories: kind -> (habitat, nouns).
HEROES: dict[str, list[str]] = {
    "forest": "fox rabbit hare bear deer squirrel hedgehog badger wolf owl mole frog raccoon beaver sparrow robin woodpecker "
    "chipmunk stag lynx toad snail butterfly ladybird beetle firefly dragonfly ant caterpillar bat dragon unicorn fairy "
    "goblin giant witch wizard elf".split(),
    "farm": "cow horse pony donkey goat sheep lamb pig piglet hen rooster duck duckling goose calf mouse bee turkey lamb".split(),
    "house": "cat kitten dog puppy hamster parrot goldfish spider moth canary mouse guinea-pig ghost toy".split(),
    "water": "fish whale dolphin seal otter crab turtle octopus starfish seahorse swan pelican shark lobster mermaid salmon jellyfish".split(),
    "hot": "lion lioness elephant giraffe zebra monkey tiger leopard camel hippo rhino crocodile ostrich flamingo gorilla "
    "chameleon lizard kangaroo koala panda sloth toucan peacock snake meerkat".split(),
    "ice": "penguin walrus reindeer husky yeti polar-bear snowman moose puffin".split(),
    "town": "girl boy baker sailor farmer teacher painter gardener fisherman tailor shepherd carpenter clockmaker librarian "
    "postman musician cook knight princess prince king queen pirate grandmother grandfather doctor inventor juggler "
    "miller blacksmith student astronaut programmer nurse pilot detective poet dancer child woman man".split(),
    "thing": "robot boat kettle clock lamp train teapot star cloud kite balloon snowflake tree flower lighthouse candle bell "
    "umbrella tractor bus car bicycle drum book pencil shoe button raindrop moon sun computer server spoon mountain river "
    "rocket pumpkin teddy-bear doll key violin".split(),
}

HOMES: dict[str, list[str]] = {
    "forest": ["at the edge of a quiet forest", "under an old oak tree", "in a green wood", "near a mossy hill", "beside a small brook in the woods"],
    "farm": ["on a farm by a river", "in a red barn", "on a small farm behind the hill", "beside a wide meadow", "near an old mill"],
    "house": ["in a house with a blue door", "in a small house by the sea", "in a tall house in the city", "in a warm kitchen", "above a little bakery"],
    "water": ["in a calm blue bay", "near a rocky island", "beside a wide lake", "in the warm sea", "in a quiet harbour"],
    "hot": ["on a wide sunny plain", "near a slow brown river", "under a tall palm tree", "in a green valley far away", "beside a quiet water hole"],
    "ice": ["in the snowy north", "on a white shore", "beside a frozen lake", "at the foot of an icy mountain", "where the nights are long"],
    "town": ["in a small town by the sea", "in a village on a hill", "in a house at the end of the road", "in a busy harbour town", "in a valley full of orchards"],
    "thing": ["in a quiet village", "high above a small town", "at the end of a long road", "beside a garden full of roses", "near the old harbour"],
}

PLACES: dict[str, list[str]] = {
    "forest": ["the deep woods", "the old stone bridge", "the clearing", "the blackberry hill", "the pond"],
    "farm": ["the far meadow", "the apple orchard", "the old mill", "the pond", "the hill behind the barn"],
    "house": ["the attic", "the garden", "the cellar", "the park", "the big market"],
    "water": ["the coral garden", "the old wreck", "the lighthouse rock", "the sandy beach", "the far island"],
    "hot": ["the tall rocks", "the river bend", "the big fig tree", "the far hills", "the water hole"],
    "ice": ["the ice cave", "the frozen lake", "the snowy hill", "the cold shore", "the great glacier"],
    "town": ["the market square", "the old bridge", "the harbour", "the hill above the town", "the library"],
    "thing": ["the market square", "the old bridge", "the harbour", "the hill above the town", "the wide field"],
}

ADJECTIVES = "small young little kind shy brave clever curious quiet cheerful gentle lonely busy old careful".split()

# (name, pronoun)
NAMES: list[tuple[str, str]] = [(n, "he") for n in (
    "Rusty Tom Max Finn Oliver Leo Hugo Milo Oscar Theo Jack Ben Sam Felix Bruno Otto Arlo Toby Ned Pip Barnaby Jasper Rufus "
    "Henry Walter Emil Kofi Ravi Omar Luca Noah Yuki Diego Anton").split()] + [(n, "she") for n in (
    "Ruby Anna Mia Lily Clara Rosa Nina Lucy Daisy Hazel Ivy Ella Maya Luna Poppy Willow Greta Olive Stella Tilly Juno Wanda "
    "Flora Edith Amara Priya Leila Sofia Nora Ingrid Zara Mei Elsa Fern").split()]

# Syllables of invented names: they teach the model to copy what it was told.
SYLLABLES = "ba be bo da de do fa fi ga go ja ka ke ki la le lo ma me mi na ni no pa pe ra ri ro sa se so ta ti to va vi wa ya za zo".split()

THINGS = ("lantern key map bell book kite drum ball scarf hat basket boat whistle ring shell feather blanket button flute coin "
          "umbrella cup mirror candle compass box letter stone red-ribbon wooden-spoon").split()

FOODS = "apples berries nuts bread figs cake grapes pears carrots cherries biscuits cheese pancakes plums".split()

SKILLS: list[tuple[str, str]] = [  # (infinitive, what the others hear or see when it works)
    ("sing", "a clear and happy song"), ("dance", "a light and lovely dance"), ("paint", "a picture full of colour"),
    ("whistle", "a bright little tune"), ("play the drum", "a steady and merry beat"), ("tell stories", "a story that made everyone smile"),
    ("juggle", "five plums going round in the air"), ("fly a kite", "a red kite high in the sky"), ("bake", "a cake as round as the moon"),
    ("read", "a whole page without a mistake"), ("skate", "a perfect circle on the ice"), ("count the stars", "a list of a hundred stars"),
]

FEARS: list[tuple[str, str]] = [  # (what, why it is not so bad)
    ("the dark", "the dark is only the day with its eyes closed"), ("thunder", "thunder is only the sky clearing its throat"),
    ("deep water", "water carries those who stay calm"), ("high places", "one small step at a time is enough"),
    ("the wind", "the wind only wants to play"), ("strangers", "every friend was once a stranger"),
    ("big shadows", "a shadow needs a light to make it"), ("loud noises", "most loud things are far away"),
]

SOUNDS: list[tuple[str, str]] = [  # (sound, its harmless cause)
    ("a soft tapping", "a branch that knocked on the window"), ("a low humming", "a bee that had lost its way"),
    ("a strange creaking", "an old gate in the wind"), ("a quiet ringing", "a bell on the collar of a kitten"),
    ("a long whistle", "the wind in an empty bottle"), ("a slow dripping", "a tap that nobody had closed"),
    ("a rustling", "a hedgehog in the dry leaves"), ("a funny snoring", "the neighbour asleep in his chair"),
]

WEATHERS: list[str] = ["a sunny morning", "a cold morning", "a rainy day", "a windy afternoon", "a quiet evening", "the first day of spring",
                       "a warm summer day", "a misty autumn morning", "the last day of winter"]

ENDINGS: list[str] = [
    "From that day on, {name} was never lonely again.", "And that night {name} slept very well.",
    "{name} smiled all the way home.", "And they were good friends ever after.",
    "{name} never forgot that day.", "It was the best day {name} had ever had.",
    "And if you listen well, you can still hear them laugh.", "Since then {name} has helped everyone who asked.",
    "The end.",
]

OPPOSITES: list[tuple[str, str]] = [tuple(p.split("/")) for p in (  # type: ignore[misc]
    "hot/cold big/small up/down left/right day/night happy/sad fast/slow old/young new/old good/bad light/dark open/closed full/empty "
    "high/low long/short rich/poor hard/soft early/late near/far in/out on/off wet/dry loud/quiet strong/weak thick/thin wide/narrow "
    "clean/dirty easy/difficult first/last true/false begin/end win/lose push/pull give/take buy/sell love/hate friend/enemy heavy/light "
    "tall/short warm/cool inside/outside above/below before/after always/never more/less many/few yes/no asleep/awake brave/afraid "
    "deep/shallow sweet/sour smooth/rough summer/winter north/south east/west black/white front/back").split()]

PLURALS: list[tuple[str, str]] = [tuple(p.split("/")) for p in (  # type: ignore[misc]
    "cat/cats dog/dogs house/houses box/boxes child/children mouse/mice foot/feet tooth/teeth man/men woman/women goose/geese "
    "sheep/sheep fish/fish leaf/leaves knife/knives wolf/wolves baby/babies city/cities story/stories bus/buses glass/glasses "
    "tree/trees car/cars book/books key/keys day/days toy/toys potato/potatoes tomato/tomatoes hero/heroes ox/oxen person/people "
    "fox/foxes brush/brushes church/churches lady/ladies fly/flies cherry/cherries half/halves shelf/shelves loaf/loaves wife/wives "
    "life/lives deer/deer star/stars model/models token/tokens block/blocks page/pages server/servers request/requests").split()]

PASTS: list[tuple[str, str]] = [tuple(p.split("/")) for p in (  # type: ignore[misc]
    "go/went see/saw eat/ate run/ran sing/sang write/wrote read/read take/took give/gave come/came make/made find/found think/thought "
    "buy/bought bring/brought fly/flew swim/swam walk/walked play/played talk/talked begin/began drink/drank drive/drove sleep/slept "
    "speak/spoke know/knew grow/grew").split()]

CAPITALS: list[tuple[str, str]] = [tuple(p.split("/")) for p in (  # type: ignore[misc]
    "France/Paris Germany/Berlin Italy/Rome Spain/Madrid Portugal/Lisbon England/London Scotland/Edinburgh Wales/Cardiff Ireland/Dublin "
    "Austria/Vienna Switzerland/Bern Poland/Warsaw Norway/Oslo Sweden/Stockholm Finland/Helsinki Denmark/Copenhagen Greece/Athens "
    "Hungary/Budapest Belgium/Brussels Russia/Moscow Ukraine/Kyiv Turkey/Ankara Egypt/Cairo Kenya/Nairobi Japan/Tokyo China/Beijing "
    "India/New_Delhi Canada/Ottawa Mexico/Mexico_City Cuba/Havana Peru/Lima Chile/Santiago Brazil/Brasilia Argentina/Buenos_Aires "
    "Australia/Canberra Iceland/Reykjavik Romania/Bucharest Bulgaria/Sofia Croatia/Zagreb Serbia/Belgrade Estonia/Tallinn Latvia/Riga "
    "Lithuania/Vilnius Thailand/Bangkok Vietnam/Hanoi Iran/Tehran Iraq/Baghdad Nepal/Kathmandu Morocco/Rabat Ghana/Accra "
    "the_Netherlands/Amsterdam the_United_States/Washington_D.C. the_United_Kingdom/London South_Korea/Seoul New_Zealand/Wellington "
    "Indonesia/Jakarta Pakistan/Islamabad").split()]
CAPITALS = [(a.replace("_", " "), b.replace("_", " ")) for a, b in CAPITALS]

ANIMAL_SOUNDS: list[tuple[str, str]] = [tuple(p.split("/")) for p in (  # type: ignore[misc]
    "dog/woof cat/meow cow/moo sheep/baa duck/quack pig/oink hen/cluck rooster/cock-a-doodle-doo frog/croak owl/hoo bee/buzz snake/hiss "
    "lion/roar horse/neigh donkey/hee-haw mouse/squeak wolf/howl").split()]

LEGS: list[tuple[str, str]] = [tuple(p.split("/")) for p in (  # type: ignore[misc]
    "dog/four cat/four cow/four horse/four spider/eight ant/six bee/six bird/two hen/two duck/two fish/no snake/no butterfly/six "
    "person/two elephant/four fox/four octopus/eight").split()]

COLOURS_OF: list[tuple[str, str]] = [tuple(p.split("/")) for p in (  # type: ignore[misc]
    "the_sky/blue grass/green snow/white a_banana/yellow a_tomato/red an_orange/orange coal/black a_lemon/yellow blood/red the_sea/blue "
    "a_carrot/orange milk/white a_cherry/red a_leaf/green chocolate/brown a_fox/red the_sun/yellow an_elephant/grey a_flamingo/pink").split()]
COLOURS_OF = [(a.replace("_", " "), b) for a, b in COLOURS_OF]

# Things to list: (name in the plural, members).
CATEGORIES: list[tuple[str, list[str]]] = [
    ("colours", "red blue green yellow orange purple pink brown black white grey".split()),
    ("colors", "red blue green yellow orange purple pink brown black white gray".split()),
    ("animals", "fox bear owl horse cat dog rabbit lion whale penguin elephant".split()),
    ("fruits", "apple pear plum cherry banana orange grape lemon peach mango".split()),
    ("vegetables", "carrot potato onion pea cabbage leek tomato pumpkin bean".split()),
    ("countries", "France Japan Kenya Brazil Norway India Canada Spain Egypt Chile".split()),
    ("cities", "Paris London Tokyo Cairo Lima Oslo Rome Madrid Nairobi Berlin".split()),
    ("birds", "owl robin sparrow eagle duck swan penguin parrot pelican".split()),
    ("farm animals", "cow horse pig sheep goat hen duck donkey".split()),
    ("sea animals", "whale dolphin seal crab octopus turtle shark fish".split()),
    ("months", "January February March April May June July August September October November December".split()),
    ("days of the week", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()),
    ("seasons", "spring summer autumn winter".split()),
    ("planets", "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()),
    ("musical instruments", "piano violin drum flute guitar trumpet harp cello".split()),
    ("tools", "hammer saw screwdriver wrench drill spade rake".split()),
    ("drinks", "water tea coffee milk juice cocoa lemonade".split()),
    ("sports", "football tennis swimming running cycling rowing chess skating".split()),
    ("programming languages", "Rust Python C Java Go Haskell Lisp".split()),
    ("trees", "oak birch pine willow maple beech elm".split()),
    ("flowers", "rose tulip daisy lily poppy violet sunflower".split()),
    ("shapes", "circle square triangle oval star rectangle".split()),
    ("jobs", "baker teacher farmer nurse pilot painter carpenter".split()),
    ("metals", "iron gold silver copper tin lead".split()),
    ("parts of the body", "head hand foot nose ear eye knee arm".split()),
    ("pieces of furniture", "table chair bed shelf desk sofa lamp".split()),
    ("clothes", "hat coat shirt shoe scarf sock glove".split()),
    ("names", "Anna Ben Clara Finn Ivy Leo Maya Oscar Ruby Tom".split()),
    ("even numbers", "2 4 6 8 10 12 14 16 18 20".split()),
    ("odd numbers", "1 3 5 7 9 11 13 15 17 19".split()),
    ("prime numbers", "2 3 5 7 11 13 17 19".split()),
]

NUMBER_WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
                "eighteen nineteen twenty").split()

CITIES = "Paris London Tokyo Cairo Lima Oslo Rome Madrid Nairobi Berlin Vienna Dublin Athens Boston Toronto Sydney Bern Lisbon".split()
JOBS = "baker teacher farmer nurse pilot painter carpenter engineer doctor writer gardener cook librarian programmer".split()
HOBBIES = "reading chess painting running cooking swimming music gardening cycling dancing drawing fishing".split()
COLOURS = "red blue green yellow orange purple pink brown black white grey".split()
FRUITS = "apple pear plum cherry banana orange grape lemon peach mango".split()
COUNTRIES = "France Japan Kenya Brazil Norway India Canada Spain Egypt Chile Italy Germany".split()
PRODUCTS = "lamp chair kettle bicycle notebook backpack teapot clock table radio umbrella keyboard".split()
TITLES = ["The Quiet River", "A Lamp in the Snow", "The Last Train", "Seven Keys", "The Paper Boat", "Winter Garden", "The Red Kite", "North Wind"]
SPECIES = "fox cat dog owl bear rabbit horse parrot turtle hamster lion penguin".split()

# Questions outside what the model was taught; {x} stands for any word of UNKNOWN_TOPICS.
UNKNOWN_QUESTIONS = [
    "How do I cook {x}?", "Who invented {x}?", "What is the history of {x}?", "Can you explain {x}?", "What do you think about {x}?",
    "Write an essay about {x}.", "How does {x} work?", "Why is {x} important?", "What is {x}?", "Who is the best at {x}?",
    "How much does {x} cost?", "Where can I buy {x}?", "Tell me everything about {x}.", "Give me advice about {x}.",
    "What happened in {x}?", "Is {x} good for me?", "How old is {x}?", "Write code for {x}.", "Summarise {x} for me.",
    "Compare {x} and {y}.", "What is the difference between {x} and {y}?", "Which is better, {x} or {y}?", "When did {x} start?",
    "What is the meaning of {x}?", "Who won {x}?", "Define {x}.", "Teach me {x}.", "What are the rules of {x}?", "How can I learn {x}?",
    "Do you know anything about {x}?", "What do you know about {x}?",
]
UNKNOWN_TOPICS = [
    "quantum physics", "the stock market", "medieval law", "calculus", "philosophy", "jazz", "the French Revolution", "photosynthesis",
    "electric cars", "the human heart", "black holes", "the economy", "DNA", "inflation", "democracy", "gravity", "bitcoin", "football",
    "the Olympics", "vaccines", "volcanoes", "Shakespeare", "the Roman Empire", "chemistry", "a divorce", "insurance", "headaches",
    "climate change", "the election", "tax law", "nuclear energy", "opera", "psychology", "sushi", "lasagne", "Linux", "SQL", "JavaScript",
    "machine learning", "the Second World War", "Einstein", "Napoleon", "the pyramids", "the brain", "yoga", "diabetes", "marketing",
    "blockchain", "astrology", "relativity", "evolution", "the internet", "airplanes", "poker", "the universe", "algebra", "geometry",
    "mathematics", "biology", "Mozart", "Beethoven", "Picasso", "the Moon landing", "Antarctica", "dinosaurs", "the Middle Ages", "love",
    "happiness", "the meaning of life", "time travel", "a mortgage", "a transformer", "a neural network", "a compiler", "Docker",
    "a linked list", "sorting algorithms", "cryptography", "the law", "medicine", "bread dough", "pizza", "curry", "wine", "coffee beans",
]
UNKNOWN_FIXED = [
    "What is the weather today?", "What time is it?", "What is the date today?", "What is in the news?", "Who is the president?",
    "Translate this into French: good morning", "Write a Python function that sorts a list.", "Write a program in Rust.",
    "Who won the World Cup?", "Can you book a flight for me?", "Play some music.", "What should I eat tonight?", "Fix my code.",
    "Write a letter to my landlord.", "Should I see a doctor?", "How do I lose weight?", "What is the best phone?", "Search the web for me.",
    "Who wrote Hamlet?", "What is the speed of light?", "How far is the Moon?", "What is my password?", "Draw me a picture.",
    "Solve x squared plus 3x = 10.", "How do I get rich?", "Plan a trip to Japan for me.", "Write an email to my boss.", "Tell me the news.",
    "How do I fix my car?", "What is the population of the world?", "Who are you voting for?", "Can you see this picture?",
    "What is the square root of 2?", "Can you give me medical advice?", "Explain the theory of relativity.", "How many r's are in strawberry?", "Write a haiku.", "Write a song.", "Tell me a secret.",
    "Who is your favourite actor?", "What is happening in the world?", "Recommend a film.", "Give me a recipe for soup.", "Why do people dream?",
]
