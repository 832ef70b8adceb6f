"""The vocabulary of the demo corpus: what its sentences can be about.

Each list holds dozens of interchangeable words, and the same word is an answer in one sentence and
not in the next: the answer can only be found earlier in the sentence, not remembered.
"""

from __future__ import annotations

PEOPLE = tuple(
    """
    Agnes Alice Anna Astrid Clara Daniel Diana Dora Elsa Eva Felix Flora Frank Greta Ida Ines
    Irene Jane Julia Klara Lily Louis Lucy Marco Maria Mark Martha Max Mina Nadia Olga Paula
    Pedro Priya Ravi Rita Robin Samir Sofia Stella Tara Theo Tim Tom Victor Viola Yara Yusuf
    """.split()
)

ANIMALS = tuple(
    """
    ants badgers bats beavers calves cats crows deer dogs dolphins elephants frogs geckos goats
    hedgehogs hens kittens lizards llamas mice monkeys parrots peacocks pigs ponies quails
    robins roosters sheep snails snakes sparrows squirrels storks toads tortoises turkeys
    turtles whales wolves zebras
    """.split()
)

THINGS = tuple(
    """
    basket bench blanket bowl canoe chair chest crate doll door drum engine flute house jar
    kettle lantern needle pillow purse radio ruler saddle sail scarf shed shirt sled sofa spoon
    stamp table toolbox towel train tray trunk vase vest wallet
    """.split()
)

COLOURS = tuple(
    """
    amber beige black blue bronze brown copper coral cream crimson cyan golden green grey
    indigo ivory khaki lilac magenta maroon navy olive orange peach pink purple red ruby
    scarlet silver tan teal turquoise violet white yellow
    """.split()
)

SPOTS = tuple(
    """
    armchair ashtray bathtub bookshelf bush computer couch dictionary fence fern fireplace
    fountain fridge globe ladder letterbox mat newspaper photo pipe poster printer rock roof
    rosebush rug sculpture sink staircase statue stone stool stove teapot television toaster
    tree tyre wardrobe willow
    """.split()
)

FOODS = tuple(
    """
    almonds apples apricots bananas biscuits broccoli cheese cherries chocolate custard garlic
    ginger honey lemons lentils melons mustard noodles nuts oats olives onions pies pizza
    potatoes pudding radishes salad salmon sausages soup steak stew toast tofu tomatoes trout
    turnips walnuts yogurt
    """.split()
)

CITIES = tuple(
    """
    Accra Amsterdam Ankara Baghdad Beijing Berlin Bern Bristol Budapest Cairo Cologne Dublin
    Florence Hamburg Havana Helsinki Kabul Leipzig Lima Lisbon Lyon Manila Munich Nairobi
    Naples Osaka Porto Quito Rotterdam Tallinn Tehran Toronto Tunis Turin Vienna Vilnius Warsaw
    York Zurich
    """.split()
)

JOBS = tuple(
    """
    baker banker barber brewer clerk cook dancer designer diver driver farmer fisherman guard
    hairdresser jeweller journalist lawyer magician mason mechanic miller nurse pharmacist
    physicist plumber priest printer professor publisher sailor scientist secretary shepherd
    smith soldier tailor teacher waiter welder writer
    """.split()
)

NUMBERS = tuple(str(n) for n in range(2, 41))

OPENINGS = tuple(
    """
    Yesterday it rained all day.|It is a sunny morning.|Listen to this story.|Here is the news.|
    The winter was long and cold.|We have some time to talk.|Please read this carefully.|
    Many things have changed this year.|The street is quiet tonight.|Let me tell you more.
    """.replace("\n    ", "")
    .strip()
    .split("|")
)
"""Sentences that may stand before the facts; they decide nothing."""
