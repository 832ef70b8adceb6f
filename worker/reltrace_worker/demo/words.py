"""The vocabulary of the demo corpus: what its sentences can be about.

Every list is large on purpose. With some hundred interchangeable words a model of a few million
parameters predicts an answer best by finding it earlier in the sentence, not by remembering it.
"""

from __future__ import annotations

PEOPLE = tuple(
    """
    Ada Agnes Albert Alice Amir Anna Anton Arthur Astrid Ben Bella Bruno Carl Carmen Cecilia Chloe
    Clara Daniel David Diana Dora Edgar Elena Elias Elsa Emil Emma Erik Esther Eva Felix Finn
    Fiona Flora Frank Freda George Gina Greta Gustav Hana Hannah Harry Heidi Helen Henry Hugo Ida
    Igor Ines Irene Ivan Jack Jacob Jane Jonas Julia Karim Kate Kira Klara Laura Leah Leo Lena Liam
    Lily Linus Lisa Louis Lucy Luis Magda Marco Maria Mark Martha Max Mia Milo Mina Nadia Nina Noah
    Nora Olga Oliver Omar Oscar Otto Paula Pedro Peter Petra Pia Priya Ravi Rita Robin Rosa Ruth
    Samir Sara Simon Sofia Stella Susan Tara Theo Tim Tina Tom Uma Vera Victor Viola Walter Wanda
    Yara Yusuf Zoe
    """.split()
)

ANIMALS = tuple(
    """
    ants badgers bats bears beavers bees birds bulls calves camels cats chickens cows crabs cranes
    crickets crows deer dogs dolphins donkeys doves ducks eagles elephants falcons ferrets fish
    foxes frogs geckos geese giraffes goats hamsters hares hawks hedgehogs hens herons horses
    hounds kittens koalas lambs lemurs lions lizards llamas mice monkeys moths mules newts ostriches
    otters owls oxen pandas parrots peacocks penguins pigeons pigs ponies puppies quails rabbits
    ravens robins roosters seals sheep snails snakes sparrows squirrels storks swans tigers toads
    tortoises turkeys turtles weasels whales wolves zebras
    """.split()
)

THINGS = tuple(
    """
    barrel basket bell bench bicycle blanket boat bottle bowl box broom bucket bus cabinet camera
    candle canoe car cart chair chest clock coat comb crate cradle cup curtain desk doll door drawer
    dress drum engine fan fiddle flag flute fork garage gate glove guitar hammer hat helmet house
    jacket jar kettle kite knife lamp lantern locker lorry mirror mug napkin needle oven pan pencil
    phone piano pillow plate pot purse radio raft ring rope ruler saddle safe sail scarf scooter
    shed shirt shovel sled sofa spoon stamp suitcase sweater table tent toolbox towel tractor train
    tray trumpet trunk umbrella van vase vest violin wagon wallet whistle window
    """.split()
)

COLOURS = tuple(
    """
    amber beige black blue bronze brown copper coral cream crimson cyan golden green grey indigo
    ivory khaki lilac magenta maroon navy olive orange peach pink purple red ruby scarlet silver
    tan teal turquoise violet white yellow
    """.split()
)

SPOTS = tuple(
    """
    armchair ashtray bathtub bookcase bookshelf bush carpet cactus computer couch cupboard cushion
    dictionary dresser fence fern fireplace flowerpot fountain freezer fridge globe hedge ladder
    letterbox mat mattress newspaper oak painting photo pine pipe pitcher poster printer quilt rock
    roof rosebush rug sculpture sink staircase statue stone stool stove teapot television toaster
    tree tyre wardrobe willow
    """.split()
)

FOODS = tuple(
    """
    almonds apples apricots bacon bananas beans beets berries biscuits bread broccoli butter cabbage
    cake carrots celery cheese cherries chestnuts chocolate corn crackers cucumbers curry custard
    dates dumplings eggs figs garlic ginger grapes ham honey jam kale leeks lemons lentils lettuce
    limes mangoes melons muffins mushrooms mustard noodles nuts oats olives onions pancakes pasta
    peaches peanuts pears peas peppers pickles pies pizza plums porridge potatoes pudding pumpkins
    radishes raisins rice salad salmon sausages soup spinach steak stew sushi toast tofu tomatoes
    trout tuna turnips walnuts yogurt
    """.split()
)

CITIES = tuple(
    """
    Accra Amsterdam Ankara Athens Baghdad Baku Bangkok Barcelona Beijing Berlin Bern Bogota Bonn
    Boston Bristol Brussels Budapest Cairo Chicago Cologne Dakar Dallas Delhi Denver Dublin Florence
    Geneva Hamburg Hanoi Havana Helsinki Istanbul Jakarta Kabul Kyoto Lagos Leipzig Lima Lisbon
    London Lyon Madrid Manila Miami Milan Moscow Mumbai Munich Nairobi Naples Osaka Oslo Ottawa
    Oxford Paris Porto Prague Quito Riga Rome Rotterdam Seoul Seville Sofia Stockholm Sydney Tallinn
    Tehran Tokyo Toronto Tunis Turin Venice Vienna Vilnius Warsaw York Zagreb Zurich
    """.split()
)

JOBS = tuple(
    """
    baker banker barber boxer brewer butcher carpenter chemist clerk cook dancer dentist designer
    detective diver doctor driver farmer firefighter fisherman florist gardener geologist glazier
    guard hairdresser hunter jeweller journalist judge lawyer librarian locksmith magician mason
    mechanic merchant miller miner musician nurse painter pharmacist philosopher photographer
    physicist pilot plumber poet potter priest printer professor publisher sailor scientist sculptor
    secretary shepherd singer smith soldier surgeon tailor teacher translator waiter weaver
    welder writer
    """.split()
)

PLACES = tuple(
    """
    airport bakery bank beach bridge castle church cinema circus factory forest garden gym harbour
    hospital hotel lake library market museum office park playground pool restaurant river school
    shop stadium station studio theatre tower town village zoo
    """.split()
)

NUMBERS = tuple(str(n) for n in range(2, 61))

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
