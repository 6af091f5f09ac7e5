"""Prompts to sample for: a file's, a list's, or a set that is known by name.

The sets of animals are those of DDPO (2305.13301), as listed in ddpo-pytorch (Copyright (c) 2023 Kevin Black; MIT
licence, in PROMPTS_LICENSE beside this file); `imagenet_animals` are the first 398 of ImageNet's class names, with their
synonyms.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from cm_diffusers.data.tables import read_lines
from cm_diffusers.errors import UserError, readable


ARTICLES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")
PLURAL = ("trousers",)
PROMPT_FILES = (".txt", ".jsonl")
OF_PATHS = re.compile(r"[/\\]|\.[a-z]\w*$", re.IGNORECASE)  # in a single word
ALIKE = 0.8  # from such a likeness on a word is taken for a misspelt set
SIMPLE_ANIMALS = """
cat; dog; horse; monkey; rabbit; zebra; spider; bird; sheep; deer; cow; goat; lion; tiger; bear; raccoon; fox; wolf;
lizard; beetle; ant; butterfly; fish; shark; whale; dolphin; squirrel; mouse; rat; snake; turtle; frog; chicken; duck;
goose; bee; pig; turkey; fly; llama; camel; bat; gorilla; hedgehog; kangaroo
"""
IMAGENET_ANIMALS = """
tench, Tinca tinca; goldfish, Carassius auratus; great white shark, white shark, man-eater, man-eating shark,
Carcharodon carcharias; tiger shark, Galeocerdo cuvieri; hammerhead, hammerhead shark; electric ray, crampfish,
numbfish, torpedo; stingray; cock; hen; ostrich, Struthio camelus; brambling, Fringilla montifringilla; goldfinch,
Carduelis carduelis; house finch, linnet, Carpodacus mexicanus; junco, snowbird; indigo bunting, indigo finch, indigo
bird, Passerina cyanea; robin, American robin, Turdus migratorius; bulbul; jay; magpie; chickadee; water ouzel,
dipper; kite; bald eagle, American eagle, Haliaeetus leucocephalus; vulture; great grey owl, great gray owl, Strix
nebulosa; European fire salamander, Salamandra salamandra; common newt, Triturus vulgaris; eft; spotted salamander,
Ambystoma maculatum; axolotl, mud puppy, Ambystoma mexicanum; bullfrog, Rana catesbeiana; tree frog, tree-frog; tailed
frog, bell toad, ribbed toad, tailed toad, Ascaphus trui; loggerhead, loggerhead turtle, Caretta caretta; leatherback
turtle, leatherback, leathery turtle, Dermochelys coriacea; mud turtle; terrapin; box turtle, box tortoise; banded
gecko; common iguana, iguana, Iguana iguana; American chameleon, anole, Anolis carolinensis; whiptail, whiptail
lizard; agama; frilled lizard, Chlamydosaurus kingi; alligator lizard; Gila monster, Heloderma suspectum; green
lizard, Lacerta viridis; African chameleon, Chamaeleo chamaeleon; Komodo dragon, Komodo lizard, dragon lizard, giant
lizard, Varanus komodoensis; African crocodile, Nile crocodile, Crocodylus niloticus; American alligator, Alligator
mississipiensis; triceratops; thunder snake, worm snake, Carphophis amoenus; ringneck snake, ring-necked snake, ring
snake; hognose snake, puff adder, sand viper; green snake, grass snake; king snake, kingsnake; garter snake, grass
snake; water snake; vine snake; night snake, Hypsiglena torquata; boa constrictor, Constrictor constrictor; rock
python, rock snake, Python sebae; Indian cobra, Naja naja; green mamba; sea snake; horned viper, cerastes, sand viper,
horned asp, Cerastes cornutus; diamondback, diamondback rattlesnake, Crotalus adamanteus; sidewinder, horned
rattlesnake, Crotalus cerastes; trilobite; harvestman, daddy longlegs, Phalangium opilio; scorpion; black and gold
garden spider, Argiope aurantia; barn spider, Araneus cavaticus; garden spider, Aranea diademata; black widow,
Latrodectus mactans; tarantula; wolf spider, hunting spider; tick; centipede; black grouse; ptarmigan; ruffed grouse,
partridge, Bonasa umbellus; prairie chicken, prairie grouse, prairie fowl; peacock; quail; partridge; African grey,
African gray, Psittacus erithacus; macaw; sulphur-crested cockatoo, Kakatoe galerita, Cacatua galerita; lorikeet;
coucal; bee eater; hornbill; hummingbird; jacamar; toucan; drake; red-breasted merganser, Mergus serrator; goose;
black swan, Cygnus atratus; tusker; echidna, spiny anteater, anteater; platypus, duckbill, duckbilled platypus,
duck-billed platypus, Ornithorhynchus anatinus; wallaby, brush kangaroo; koala, koala bear, kangaroo bear, native
bear, Phascolarctos cinereus; wombat; jellyfish; sea anemone, anemone; brain coral; flatworm, platyhelminth; nematode,
nematode worm, roundworm; conch; snail; slug; sea slug, nudibranch; chiton, coat-of-mail shell, sea cradle,
polyplacophore; chambered nautilus, pearly nautilus, nautilus; Dungeness crab, Cancer magister; rock crab, Cancer
irroratus; fiddler crab; king crab, Alaska crab, Alaskan king crab, Alaska king crab, Paralithodes camtschatica;
American lobster, Northern lobster, Maine lobster, Homarus americanus; spiny lobster, langouste, rock lobster,
crawfish, crayfish, sea crawfish; crayfish, crawfish, crawdad, crawdaddy; hermit crab; isopod; white stork, Ciconia
ciconia; black stork, Ciconia nigra; spoonbill; flamingo; little blue heron, Egretta caerulea; American egret, great
white heron, Egretta albus; bittern; crane; limpkin, Aramus pictus; European gallinule, Porphyrio porphyrio; American
coot, marsh hen, mud hen, water hen, Fulica americana; bustard; ruddy turnstone, Arenaria interpres; red-backed
sandpiper, dunlin, Erolia alpina; redshank, Tringa totanus; dowitcher; oystercatcher, oyster catcher; pelican; king
penguin, Aptenodytes patagonica; albatross, mollymawk; grey whale, gray whale, devilfish, Eschrichtius gibbosus,
Eschrichtius robustus; killer whale, killer, orca, grampus, sea wolf, Orcinus orca; dugong, Dugong dugon; sea lion;
Chihuahua; Japanese spaniel; Maltese dog, Maltese terrier, Maltese; Pekinese, Pekingese, Peke; Shih-Tzu; Blenheim
spaniel; papillon; toy terrier; Rhodesian ridgeback; Afghan hound, Afghan; basset, basset hound; beagle; bloodhound,
sleuthhound; bluetick; black-and-tan coonhound; Walker hound, Walker foxhound; English foxhound; redbone; borzoi,
Russian wolfhound; Irish wolfhound; Italian greyhound; whippet; Ibizan hound, Ibizan Podenco; Norwegian elkhound,
elkhound; otterhound, otter hound; Saluki, gazelle hound; Scottish deerhound, deerhound; Weimaraner; Staffordshire
bullterrier, Staffordshire bull terrier; American Staffordshire terrier, Staffordshire terrier, American pit bull
terrier, pit bull terrier; Bedlington terrier; Border terrier; Kerry blue terrier; Irish terrier; Norfolk terrier;
Norwich terrier; Yorkshire terrier; wire-haired fox terrier; Lakeland terrier; Sealyham terrier, Sealyham; Airedale,
Airedale terrier; cairn, cairn terrier; Australian terrier; Dandie Dinmont, Dandie Dinmont terrier; Boston bull,
Boston terrier; miniature schnauzer; giant schnauzer; standard schnauzer; Scotch terrier, Scottish terrier, Scottie;
Tibetan terrier, chrysanthemum dog; silky terrier, Sydney silky; soft-coated wheaten terrier; West Highland white
terrier; Lhasa, Lhasa apso; flat-coated retriever; curly-coated retriever; golden retriever; Labrador retriever;
Chesapeake Bay retriever; German short-haired pointer; vizsla, Hungarian pointer; English setter; Irish setter, red
setter; Gordon setter; Brittany spaniel; clumber, clumber spaniel; English springer, English springer spaniel; Welsh
springer spaniel; cocker spaniel, English cocker spaniel, cocker; Sussex spaniel; Irish water spaniel; kuvasz;
schipperke; groenendael; malinois; briard; kelpie; komondor; Old English sheepdog, bobtail; Shetland sheepdog,
Shetland sheep dog, Shetland; collie; Border collie; Bouvier des Flandres, Bouviers des Flandres; Rottweiler; German
shepherd, German shepherd dog, German police dog, alsatian; Doberman, Doberman pinscher; miniature pinscher; Greater
Swiss Mountain dog; Bernese mountain dog; Appenzeller; EntleBucher; boxer; bull mastiff; Tibetan mastiff; French
bulldog; Great Dane; Saint Bernard, St Bernard; Eskimo dog, husky; malamute, malemute, Alaskan malamute; Siberian
husky; dalmatian, coach dog, carriage dog; affenpinscher, monkey pinscher, monkey dog; basenji; pug, pug-dog;
Leonberg; Newfoundland, Newfoundland dog; Great Pyrenees; Samoyed, Samoyede; Pomeranian; chow, chow chow; keeshond;
Brabancon griffon; Pembroke, Pembroke Welsh corgi; Cardigan, Cardigan Welsh corgi; toy poodle; miniature poodle;
standard poodle; Mexican hairless; timber wolf, grey wolf, gray wolf, Canis lupus; white wolf, Arctic wolf, Canis
lupus tundrarum; red wolf, maned wolf, Canis rufus, Canis niger; coyote, prairie wolf, brush wolf, Canis latrans;
dingo, warrigal, warragal, Canis dingo; dhole, Cuon alpinus; African hunting dog, hyena dog, Cape hunting dog, Lycaon
pictus; hyena, hyaena; red fox, Vulpes vulpes; kit fox, Vulpes macrotis; Arctic fox, white fox, Alopex lagopus; grey
fox, gray fox, Urocyon cinereoargenteus; tabby, tabby cat; tiger cat; Persian cat; Siamese cat, Siamese; Egyptian cat;
cougar, puma, catamount, mountain lion, painter, panther, Felis concolor; lynx, catamount; leopard, Panthera pardus;
snow leopard, ounce, Panthera uncia; jaguar, panther, Panthera onca, Felis onca; lion, king of beasts, Panthera leo;
tiger, Panthera tigris; cheetah, chetah, Acinonyx jubatus; brown bear, bruin, Ursus arctos; American black bear, black
bear, Ursus americanus, Euarctos americanus; ice bear, polar bear, Ursus Maritimus, Thalarctos maritimus; sloth bear,
Melursus ursinus, Ursus ursinus; mongoose; meerkat, mierkat; tiger beetle; ladybug, ladybeetle, lady beetle, ladybird,
ladybird beetle; ground beetle, carabid beetle; long-horned beetle, longicorn, longicorn beetle; leaf beetle,
chrysomelid; dung beetle; rhinoceros beetle; weevil; fly; bee; ant, emmet, pismire; grasshopper, hopper; cricket;
walking stick, walkingstick, stick insect; cockroach, roach; mantis, mantid; cicada, cicala; leafhopper; lacewing,
lacewing fly; dragonfly, darning needle, devil's darning needle, sewing needle, snake feeder, snake doctor, mosquito
hawk, skeeter hawk; damselfly; admiral; ringlet, ringlet butterfly; monarch, monarch butterfly, milkweed butterfly,
Danaus plexippus; cabbage butterfly; sulphur butterfly, sulfur butterfly; lycaenid, lycaenid butterfly; starfish, sea
star; sea urchin; sea cucumber, holothurian; wood rabbit, cottontail, cottontail rabbit; hare; Angora, Angora rabbit;
hamster; porcupine, hedgehog; fox squirrel, eastern fox squirrel, Sciurus niger; marmot; beaver; guinea pig, Cavia
cobaya; sorrel; zebra; hog, pig, grunter, squealer, Sus scrofa; wild boar, boar, Sus scrofa; warthog; hippopotamus,
hippo, river horse, Hippopotamus amphibius; ox; water buffalo, water ox, Asiatic buffalo, Bubalus bubalis; bison; ram,
tup; bighorn, bighorn sheep, cimarron, Rocky Mountain bighorn, Rocky Mountain sheep, Ovis canadensis; ibex, Capra
ibex; hartebeest; impala, Aepyceros melampus; gazelle; Arabian camel, dromedary, Camelus dromedarius; llama; weasel;
mink; polecat, fitch, foulmart, foumart, Mustela putorius; black-footed ferret, ferret, Mustela nigripes; otter;
skunk, polecat, wood pussy; badger; armadillo; three-toed sloth, ai, Bradypus tridactylus; orangutan, orang,
orangutang, Pongo pygmaeus; gorilla, Gorilla gorilla; chimpanzee, chimp, Pan troglodytes; gibbon, Hylobates lar;
siamang, Hylobates syndactylus, Symphalangus syndactylus; guenon, guenon monkey; patas, hussar monkey, Erythrocebus
patas; baboon; macaque; langur; colobus, colobus monkey; proboscis monkey, Nasalis larvatus; marmoset; capuchin,
ringtail, Cebus capucinus; howler monkey, howler; titi, titi monkey; spider monkey, Ateles geoffroyi; squirrel monkey,
Saimiri sciureus; Madagascar cat, ring-tailed lemur, Lemur catta; indri, indris, Indri indri, Indri brevicaudatus;
Indian elephant, Elephas maximus; African elephant, Loxodonta africana; lesser panda, red panda, panda, bear cat, cat
bear, Ailurus fulgens; giant panda, panda, panda bear, coon bear, Ailuropoda melanoleuca; barracouta, snoek; eel;
coho, cohoe, coho salmon, blue jack, silver salmon, Oncorhynchus kisutch; rock beauty, Holocanthus tricolor; anemone
fish; sturgeon; gar, garfish, garpike, billfish, Lepisosteus osseus; lionfish; puffer, pufferfish, blowfish, globefish
"""


class Prompt(NamedTuple):
    """A text, and what else is known of it."""

    text: str
    metadata: dict[str, Any]


def load_prompts(source: str | Path | Sequence[str]) -> list[Prompt]:
    """
    Args:
        source: A list; one of `simple_animals`, `imagenet_animals`, `animal_activities`, `fashion`; or a file with one prompt
            a line, or of type .jsonl, with objects whose `prompt` is the text and whose rest becomes metadata. Empty lines
            do not count.

    Raises:
        ValueError: There is no such set or file, it has no prompts, or a line of it cannot be read.
    """
    if not isinstance(source, str | Path):
        found = [Prompt(text, {}) for text in source]
    elif source in PROMPT_SETS:
        found = [Prompt(text, {}) for text in PROMPT_SETS[source]]
    else:
        found = _from_file(Path(source))
    if not found or not all(isinstance(text, str) and text.strip() for text, _ in found):
        where = source if isinstance(source, str | Path) else "The list"
        raise UserError(f"{where} must hold at least one prompt, and none that is empty or no text.")
    return found


def named_prompts(words: Sequence[str]) -> list[Prompt]:
    """As `load_prompts`, of a flag's words: prompts, or the name of one set or file.

    Raises:
        ValueError: As there; a single word that nearly names a set, or could only be a path, is no prompt.
    """
    first, *others = words or [""]
    names = not others and (first.endswith(PROMPT_FILES) or os.path.isfile(first) or _is_name(first))
    return load_prompts(first if names else words)


def hardest_prompts(rewards: Mapping[str, Sequence[float]], k: int) -> list[str]:
    """The k prompts of the lowest mean reward, lowest first, to train on (Carve3D, 2312.13980).

    Raises:
        ValueError: There are no k prompts, or one has no rewards.
    """
    if not 1 <= k <= len(rewards):
        raise UserError(f"k must be from 1 to the number of prompts, {len(rewards)}, but it is {k}.")
    if without := [prompt for prompt, values in rewards.items() if len(values) == 0]:
        raise UserError(f"The prompt {without[0]!r} has no rewards; sample it, or leave it out.")
    return sorted(rewards, key=lambda prompt: fmean(rewards[prompt]))[:k]


def with_article(noun: str) -> str:
    """ "a bag", "an ankle boot", "trousers"."""
    return noun if noun in PLURAL else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _is_name(text: str) -> bool:
    alike = get_close_matches(text.lower(), PROMPT_SETS, n=1, cutoff=ALIKE)
    return len(text.split()) == 1 and bool(alike or OF_PATHS.search(text))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).split("; "))


def _from_file(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise UserError(f"There is no file of prompts {path}; give one, or one of {', '.join(PROMPT_SETS)}.")
    suffix = path.suffix.lower()
    if suffix in (".csv", ".parquet", ".json"):
        raise UserError(f"{path} must hold one prompt a line, or be a .jsonl, but it ends in {suffix}.")
    with readable(f"The file of prompts {path}"):
        lines = read_lines(path)
    if suffix != ".jsonl":
        return [Prompt(line, {}) for line in lines if line]
    return [_from_json(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line]


def _from_json(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f'{where}, must be an object with a text as its prompt, such as {{"prompt": "a bag"}}.')
    return Prompt(row.pop("prompt"), row)


PROMPT_SETS = {
    "simple_animals": _listed(SIMPLE_ANIMALS),
    "imagenet_animals": _listed(IMAGENET_ANIMALS),
    "animal_activities": tuple(f"{with_article(a)} {did}" for a in _listed(SIMPLE_ANIMALS) for did in ACTIVITIES),
    "fashion": tuple(f"a photo of {with_article(article)}" for article in ARTICLES),
}
