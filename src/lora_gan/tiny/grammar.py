"""An English/French grammar small enough to read, rich enough to need agreement.

Everything the tiny base has ever read comes from here. A sentence is first a *plan* (who does what to whom, in
which mood, where, when) and is then spoken twice, by an English and by a French lineariser. Translation is a
function of the English sentence: no English sentence of this grammar has two translations (``you`` is always
``tu``, ``they`` always ``ils``, a speaker is masculine).

Two properties of the whole matter to what is built on top, and tests hold them:

* **English is prefix-free.** Sentences carry no full stop, so that "Hello world" may become "Bonjour le monde".
  A model could not know where such a prompt ends if one sentence were the beginning of another. Hence: adverbials
  stand in front, adjectives before their noun, transitive verbs always have their object, intransitive ones never.
* **Whole combinations are held out.** Each plan has a signature such as ``("act", "cat", "see", "dog")``. A hash of
  it decides whether this combination may be seen in pretraining, whatever determiners, adjectives, number or mood
  stand around it. One signature has one pair of lemmas in either language, so neither its English nor its French
  can slip in by another way.

Only the standard library and numpy are used; every draw comes from a Philox generator with an explicit seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# --------------------------------------------------------------------------------------------------------------
# Lexicon
# --------------------------------------------------------------------------------------------------------------

#: English singular and plural, French singular and plural, gender, tags. The first tag is the semantic class.
#: ``single``: there is one of it, so it has no plural and no "a" (kings, mothers, the moon);
#: ``mass``: cannot be counted (bread, water). A dash fills the plural these do not have.
NOUNS_TABLE = """
man          men           homme          hommes          m  person
woman        women         femme          femmes          f  person
boy          boys          garçon         garçons         m  person
girl         girls         fille          filles          f  person
child        children      enfant         enfants         m  person young
friend       friends       ami            amis            m  person
teacher      teachers      professeur     professeurs     m  person
doctor       doctors       médecin        médecins        m  person
student      students      étudiant       étudiants       m  person
farmer       farmers       fermier        fermiers        m  person
baker        bakers        boulanger      boulangers      m  person
neighbor     neighbors     voisin         voisins         m  person
singer       singers       chanteur       chanteurs       m  person
painter      painters      peintre        peintres        m  person
nurse        nurses        infirmière     infirmières     f  person
baby         babies        bébé           bébés           m  person young
soldier      soldiers      soldat         soldats         m  person
fisherman    fishermen     pêcheur        pêcheurs        m  person
writer       writers       écrivain       écrivains       m  person
driver       drivers       chauffeur      chauffeurs      m  person
worker       workers       ouvrier        ouvriers        m  person
cook         cooks         cuisinier      cuisiniers      m  person
dancer       dancers       danseur        danseurs        m  person
princess     princesses    princesse      princesses      f  person
prince       princes       prince         princes         m  person
brother      brothers      frère          frères          m  person kin
sister       sisters       sœur           sœurs           f  person kin
cousin       cousins       cousin         cousins         m  person kin
aunt         aunts         tante          tantes          f  person kin
uncle        uncles        oncle          oncles          m  person kin
mother       -             mère           -               f  person single kin
father       -             père           -               m  person single kin
grandmother  -             grand-mère     -               f  person single kin
grandfather  -             grand-père     -               m  person single kin
king         -             roi            -               m  person single
queen        -             reine          -               f  person single

cat          cats          chat           chats           m  animal
dog          dogs          chien          chiens          m  animal barker
bird         birds         oiseau         oiseaux         m  animal flier
horse        horses        cheval         chevaux         m  animal
cow          cows          vache          vaches          f  animal
pig          pigs          cochon         cochons         m  animal
mouse        mice          souris         souris          f  animal
rabbit       rabbits       lapin          lapins          m  animal
duck         ducks         canard         canards         m  animal flier
hen          hens          poule          poules          f  animal
lion         lions         lion           lions           m  animal
tiger        tigers        tigre          tigres          m  animal
wolf         wolves        loup           loups           m  animal
bear         bears         ours           ours            m  animal
fox          foxes         renard         renards         m  animal
elephant     elephants     éléphant       éléphants       m  animal
monkey       monkeys       singe          singes          m  animal
frog         frogs         grenouille     grenouilles     f  animal
bee          bees          abeille        abeilles        f  animal flier
butterfly    butterflies   papillon       papillons       m  animal flier
donkey       donkeys       âne            ânes            m  animal
goat         goats         chèvre         chèvres         f  animal
squirrel     squirrels     écureuil       écureuils       m  animal
turtle       turtles       tortue         tortues         f  animal

apple        apples        pomme          pommes          f  food cuttable
pear         pears         poire          poires          f  food cuttable
orange       oranges       orange         oranges         f  food cuttable
banana       bananas       banane         bananes         f  food cuttable
cake         cakes         gâteau         gâteaux         m  food cuttable cooked
egg          eggs          œuf            œufs            m  food cooked
tomato       tomatoes      tomate         tomates         f  food cuttable
carrot       carrots       carotte        carottes        f  food cuttable
cookie       cookies       biscuit        biscuits        m  food cooked
sandwich     sandwiches    sandwich       sandwichs       m  food cuttable cooked
soup         soups         soupe          soupes          f  food cooked
salad        salads        salade         salades         f  food cooked
bread        -             pain           -               m  food cuttable mass
cheese       -             fromage        -               m  food cuttable mass
butter       -             beurre         -               m  food mass
meat         -             viande         -               f  food cuttable cooked mass
rice         -             riz            -               m  food cooked mass
chocolate    -             chocolat       -               m  food mass
honey        -             miel           -               m  food mass
water        -             eau            -               f  drink mass
milk         -             lait           -               m  drink mass
coffee       -             café           -               m  drink mass
tea          -             thé            -               m  drink mass
wine         -             vin            -               m  drink mass
juice        -             jus            -               m  drink mass

book         books         livre          livres          m  thing small text opens
letter       letters       lettre         lettres         f  thing small text opens
newspaper    newspapers    journal        journaux        m  thing small text
story        stories       histoire       histoires       f  work text sung
poem         poems         poème          poèmes          m  work text sung
song         songs         chanson        chansons        f  work sung
pen          pens          stylo          stylos          m  thing small
pencil       pencils       crayon         crayons         m  thing small
key          keys          clé            clés            f  thing small
bag          bags          sac            sacs            m  thing small opens
box          boxes         boîte          boîtes          f  thing small opens
bottle       bottles       bouteille      bouteilles      f  thing small opens fragile dish
glass        glasses       verre          verres          m  thing small fragile dish
cup          cups          tasse          tasses          f  thing small fragile dish
plate        plates        assiette       assiettes       f  thing small fragile dish
knife        knives        couteau        couteaux        m  thing small dish
spoon        spoons        cuillère       cuillères       f  thing small dish
lamp         lamps         lampe          lampes          f  thing small fragile machine
watch        watches       montre         montres         f  thing small fragile machine
phone        phones        téléphone      téléphones      m  thing small fragile machine
computer     computers     ordinateur     ordinateurs     m  thing fragile machine
guitar       guitars       guitare        guitares        f  thing small fragile machine
piano        pianos        piano          pianos          m  thing machine heavy
ball         balls         ballon         ballons         m  thing small thrown
stone        stones        pierre         pierres         f  thing small thrown
toy          toys          jouet          jouets          m  thing small fragile
doll         dolls         poupée         poupées         f  thing small
gift         gifts         cadeau         cadeaux         m  thing small opens
ring         rings         bague          bagues          f  thing small
photo        photos        photo          photos          f  thing small
painting     paintings     tableau        tableaux        m  thing small
basket       baskets       panier         paniers         m  thing small
umbrella     umbrellas     parapluie      parapluies      m  thing small opens
hat          hats          chapeau        chapeaux        m  thing clothes
shirt        shirts        chemise        chemises        f  thing clothes
dress        dresses       robe           robes           f  thing clothes
coat         coats         manteau        manteaux        m  thing clothes
skirt        skirts        jupe           jupes           f  thing clothes
scarf        scarves       écharpe        écharpes        f  thing clothes
chair        chairs        chaise         chaises         f  thing heavy furniture spot_on spot_under
table        tables        table          tables          f  thing heavy furniture spot_on spot_under
bed          beds          lit            lits            m  thing heavy furniture spot_on spot_under
door         doors         porte          portes          f  thing opens heavy spot_behind
window       windows       fenêtre        fenêtres        f  thing opens fragile spot_near
car          cars          voiture        voitures        f  thing vehicle machine heavy spot_near spot_in
bike         bikes         vélo           vélos           m  thing vehicle machine
train        trains        train          trains          m  thing vehicle spot_in
boat         boats         bateau         bateaux         m  thing vehicle spot_on
plane        planes        avion          avions          m  thing vehicle spot_in flier
truck        trucks        camion         camions         m  thing vehicle machine heavy spot_behind spot_in
flower       flowers       fleur          fleurs          f  plant small
rose         roses         rose           roses           f  plant small
tree         trees         arbre          arbres          m  plant spot_under spot_near spot_behind
leaf         leaves        feuille        feuilles        f  plant small

garden       gardens       jardin         jardins         m  place goal spot_in spot_near crossed
house        houses        maison         maisons         f  place spot_in spot_near spot_behind building
school       schools       école          écoles          f  place goal spot_in spot_near spot_behind building
kitchen      kitchens      cuisine        cuisines        f  place spot_in cleaned
bedroom      bedrooms      chambre        chambres        f  place spot_in cleaned
city         cities        ville          villes          f  place spot_in spot_near crossed
village      villages      village        villages        m  place goal spot_in spot_near crossed
forest       forests       forêt          forêts          f  place spot_in spot_near crossed
street       streets       rue            rues            f  place spot_in crossed cleaned
market       markets       marché         marchés         m  place goal spot_near
park         parks         parc           parcs           m  place goal spot_in spot_near crossed
church       churches      église         églises         f  place goal spot_in spot_near spot_behind building
hospital     hospitals     hôpital        hôpitaux        m  place goal spot_in spot_near building
station      stations      gare           gares           f  place goal spot_near spot_behind building
shop         shops         magasin        magasins        m  place goal spot_in spot_near
museum       museums       musée          musées          m  place goal spot_in spot_near building
library      libraries     bibliothèque   bibliothèques   f  place goal spot_in spot_behind building
restaurant   restaurants   restaurant     restaurants     m  place goal spot_in spot_near
hotel        hotels        hôtel          hôtels          m  place goal spot_in spot_near spot_behind building
castle       castles       château        châteaux        m  place goal spot_in spot_near spot_behind building
farm         farms         ferme          fermes          f  place goal spot_in spot_near
beach        beaches       plage          plages          f  place goal spot_on spot_near
mountain     mountains     montagne       montagnes       f  place spot_on spot_near
river        rivers        rivière        rivières        f  place goal spot_near crossed
field        fields        champ          champs          m  place spot_in spot_near crossed
island       islands       île            îles            f  place spot_on spot_near
office       offices       bureau         bureaux         m  place goal spot_in cleaned
bridge       bridges       pont           ponts           m  place spot_on spot_under building crossed
lake         lakes         lac            lacs            m  place goal spot_near crossed
theater      theaters      théâtre        théâtres        m  place goal spot_in spot_near building
wall         walls         mur            murs            m  place spot_on spot_behind building

world        -             monde          -               m  nature single
sun          -             soleil         -               m  nature single bright
moon         -             lune           -               f  nature single bright
sky          -             ciel           -               m  nature single
sea          -             mer            -               f  nature single chilly
earth        -             terre          -               f  nature single chilly
wind         -             vent           -               m  nature single chilly
rain         -             pluie          -               f  nature single chilly
snow         -             neige          -               f  nature single chilly
spring       -             printemps      -               m  nature single chilly
summer       -             été            -               m  nature single
autumn       -             automne        -               m  nature single chilly
winter       -             hiver          -               m  nature single chilly
night        -             nuit           -               f  nature single chilly
fire         -             feu            -               m  nature single bright
star         stars         étoile         étoiles         f  nature bright
cloud        clouds        nuage          nuages          m  nature
"""

#: English, then French masculine and feminine singular, masculine and feminine plural, where it stands beside a French
#: noun (``predicate``: never, only after être), and the nouns it goes with, by tag or one by one.
ADJECTIVES_TABLE = """
big          grand        grande       grands       grandes       before  animal thing plant place world sea sky
small        petit        petite       petits       petites       before  person animal thing plant place food
young        jeune        jeune        jeunes       jeunes        before  person animal
old          vieux        vieille      vieux        vieilles      before  person animal thing place plant
beautiful    beau         belle        beaux        belles        before  person animal thing plant place nature work
new          nouveau      nouvelle     nouveaux     nouvelles     before  thing place work
good         bon          bonne        bons         bonnes        before  food drink work
bad          mauvais      mauvaise     mauvais      mauvaises     before  food drink work
pretty       joli         jolie        jolis        jolies        before  thing plant place
kind         gentil       gentille     gentils      gentilles     before  person animal
long         long         longue       longs        longues       before  work
tall         grand        grande       grands       grandes       predicate  person
happy        heureux      heureuse     heureux      heureuses     after   person animal
sad          triste       triste       tristes      tristes       after   person animal work
tired        fatigué      fatiguée     fatigués     fatiguées     after   person animal
strong       fort         forte        forts        fortes        after   person animal
sick         malade       malade       malades      malades       after   person animal
clever       intelligent  intelligente intelligents intelligentes after   person animal
brave        courageux    courageuse   courageux    courageuses   after   person animal
lazy         paresseux    paresseuse   paresseux    paresseuses   after   person animal
proud        fier         fière        fiers        fières        after   person animal
rich         riche        riche        riches       riches        after   person
poor         pauvre       pauvre       pauvres      pauvres       after   person
famous       célèbre      célèbre      célèbres     célèbres      after   person place work
funny        drôle        drôle        drôles       drôles        after   person animal work
honest       honnête      honnête      honnêtes     honnêtes      after   person
curious      curieux      curieuse     curieux      curieuses     after   person animal
shy          timide       timide       timides      timides       after   person animal
polite       poli         polie        polis        polies        after   person
calm         calme        calme        calmes       calmes        after   person animal sea wind night sky
fast         rapide       rapide       rapides      rapides       after   person animal
slow         lent         lente        lents        lentes        after   person animal
dangerous    dangereux    dangereuse   dangereux    dangereuses   after   animal fire sea wind world
red          rouge        rouge        rouges       rouges        after   thing plant
blue         bleu         bleue        bleus        bleues        after   thing sky sea
green        vert         verte        verts        vertes        after   thing plant
yellow       jaune        jaune        jaunes       jaunes        after   thing plant
white        blanc        blanche      blancs       blanches      after   animal thing plant place cloud moon snow
black        noir         noire        noirs        noires        after   animal thing
grey         gris         grise        gris         grises        after   animal thing place cloud sky sea
brown        brun         brune        bruns        brunes        after   animal thing
clean        propre       propre       propres      propres       after   thing place
dirty        sale         sale         sales        sales         after   animal thing place
expensive    cher         chère        chers        chères        after   thing food drink
useful       utile        utile        utiles       utiles        after   thing
heavy        lourd        lourde       lourds       lourdes       after   thing
empty        vide         vide         vides        vides         after   place
strange      étrange      étrange      étranges     étranges      after   person animal thing plant place nature work
modern       moderne      moderne      modernes     modernes      after   thing place world
quiet        tranquille   tranquille   tranquilles  tranquilles   after   place world night sea
dark         sombre       sombre       sombres      sombres       after   place sky night cloud winter
fresh        frais        fraîche      frais        fraîches      after   food drink
cold         froid        froide       froids       froides       after   food drink chilly
hot          chaud        chaude       chauds       chaudes       after   food drink sun summer fire
delicious    délicieux    délicieuse   délicieux    délicieuses   after   food drink
magnificent  magnifique   magnifique   magnifiques  magnifiques   after   place nature work
marvelous    merveilleux  merveilleuse merveilleux  merveilleuses after   nature work
"""

#: Masculine singular before a vowel, where it differs: un vieil ami, un bel arbre.
LIAISON_ADJECTIVES = {"beau": "bel", "nouveau": "nouvel", "vieux": "vieil"}

#: English base and third person, French infinitive, tags of its subjects. No verb of this table ever has an object.
INTRANSITIVE_TABLE = """
sleep      sleeps     dormir      person,animal
sing       sings      chanter     person
dance      dances     danser      person
laugh      laughs     rire        person
cry        cries      pleurer     person
swim       swims      nager       person,animal
run        runs       courir      person,animal
walk       walks      marcher     person,animal
travel     travels    voyager     person
work       works      travailler  person
smile      smiles     sourire     person
jump       jumps      sauter      person,animal
play       plays      jouer       person,animal
fall       falls      tomber      person,animal,plant,small,rain
arrive     arrives    arriver     person,animal,vehicle
leave      leaves     partir      person,animal,vehicle
pray       prays      prier       person
cook       cooks      cuisiner    person
study      studies    étudier     person
reflect    reflects   réfléchir   person
shout      shouts     crier       person
breathe    breathes   respirer    person,animal
bark       barks      aboyer      barker
fly        flies      voler       flier
shine      shines     briller     bright
return     returns    revenir     person,animal,vehicle
grow       grows      grandir     young
hesitate   hesitates  hésiter     person,animal
"""

#: English base and third person (an underscore joins the particle), French infinitive, French preposition or a
#: dash, tags of subjects, tags of objects, and ``noa`` if "a" makes a strange object (liking, in French, is of
#: things known). No verb of this table ever goes without its object.
TRANSITIVE_TABLE = """
eat          eats          manger      -     person,animal  food
drink        drinks        boire       -     person,animal  drink
buy          buys          acheter     -     person         food,drink,thing,plant
sell         sells         vendre      -     person         food,drink,thing,plant
see          sees          voir        -     person,animal  person,animal,thing,plant,place
look_at      looks_at      regarder    -     person,animal  person,animal,thing,plant,place
like         likes         aimer       -     person         person,animal,food,drink,place,work  noa
love         loves         adorer      -     person         person,animal,food,drink,place,work  noa
have         has           avoir       -     person         animal,thing
take         takes         prendre     -     person         small,clothes,vehicle
find         finds         trouver     -     person,animal  small,animal,clothes
look_for     looks_for     chercher    -     person,animal  small,person,animal,clothes
lose         loses         perdre      -     person         small,clothes
wash         washes        laver       -     person         clothes,dish,vehicle
open         opens         ouvrir      -     person         opens
close        closes        fermer      -     person         opens
read         reads         lire        -     person         text
write        writes        écrire      -     person         text,sung
learn        learns        apprendre   -     person         sung
draw         draws         dessiner    -     person         animal,plant,building,person
paint        paints        peindre     -     person         furniture,building,plant
carry        carries       transporter -     person         small,furniture
wear         wears         porter      -     person         clothes
break        breaks        casser      -     person         fragile
repair       repairs       réparer     -     person         machine
know         knows         connaître   -     person         person,place,sung
visit        visits        visiter     -     person         place
help         helps         aider       -     person         person
follow       follows       suivre      -     person,animal  person,animal
hear         hears         entendre    -     person,animal  person,animal,vehicle
call         calls         appeler     -     person         person
wait_for     waits_for     attendre    -     person         person,vehicle
invite       invites       inviter     -     person         person
cut          cuts          couper      -     person         cuttable
hide         hides         cacher      -     person         small
choose       chooses       choisir     -     person         thing,food
forget       forgets       oublier     -     person         small,clothes
push         pushes        pousser     -     person,animal  heavy
pull         pulls         tirer       -     person,animal  heavy
bring        brings        apporter    -     person         small,food,drink
prepare      prepares      préparer    -     person         cooked
taste        tastes        goûter      -     person         food,drink
throw        throws        lancer      -     person         thrown
catch        catches       attraper    -     person,animal  thrown,animal
protect      protects      protéger    -     person,animal  person,animal
cross        crosses       traverser   -     person,animal  crossed
clean        cleans        nettoyer    -     person         cleaned,clothes,furniture
build        builds        construire  -     person         building
feed         feeds         nourrir     -     person         animal,young
chase        chases        poursuivre  -     animal         animal,person
bite         bites         mordre      -     animal         animal,person
thank        thanks        remercier   -     person         person
greet        greets        saluer      -     person         person
listen_to    listens_to    écouter     -     person         person,sung
go_to        goes_to       aller       à     person,animal  goal  noa
come_from    comes_from    venir       de    person,animal  goal
talk_to      talks_to      parler      à     person         person,animal
think_of     thinks_of     penser      à     person         person,animal,place
dream_of     dreams_of     rêver       de    person         person,animal,vehicle,place
answer       answers       répondre    à     person         person
enter        enters        entrer      dans  person,animal  spot_in
"""

#: As above, for "gives the book to the child". Subjects are persons, objects small things, receivers persons.
DITRANSITIVE_TABLE = """
give         gives         donner
show         shows         montrer
send         sends         envoyer
lend         lends         prêter
offer        offers        offrir
"""

#: Present tense: je, tu, il, nous, ils. Regular verbs follow `conjugate`; everything else stands here.
IRREGULAR_PRESENT = {
    "acheter": ("achète", "achètes", "achète", "achetons", "achètent"),
    "aller": ("vais", "vas", "va", "allons", "vont"),
    "appeler": ("appelle", "appelles", "appelle", "appelons", "appellent"),
    "apprendre": ("apprends", "apprends", "apprend", "apprenons", "apprennent"),
    "avoir": ("ai", "as", "a", "avons", "ont"),
    "boire": ("bois", "bois", "boit", "buvons", "boivent"),
    "connaître": ("connais", "connais", "connaît", "connaissons", "connaissent"),
    "construire": ("construis", "construis", "construit", "construisons", "construisent"),
    "courir": ("cours", "cours", "court", "courons", "courent"),
    "devoir": ("dois", "dois", "doit", "devons", "doivent"),
    "dormir": ("dors", "dors", "dort", "dormons", "dorment"),
    "écrire": ("écris", "écris", "écrit", "écrivons", "écrivent"),
    "être": ("suis", "es", "est", "sommes", "sont"),
    "lire": ("lis", "lis", "lit", "lisons", "lisent"),
    "offrir": ("offre", "offres", "offre", "offrons", "offrent"),
    "ouvrir": ("ouvre", "ouvres", "ouvre", "ouvrons", "ouvrent"),
    "partir": ("pars", "pars", "part", "partons", "partent"),
    "peindre": ("peins", "peins", "peint", "peignons", "peignent"),
    "poursuivre": ("poursuis", "poursuis", "poursuit", "poursuivons", "poursuivent"),
    "pouvoir": ("peux", "peux", "peut", "pouvons", "peuvent"),
    "prendre": ("prends", "prends", "prend", "prenons", "prennent"),
    "protéger": ("protège", "protèges", "protège", "protégeons", "protègent"),
    "revenir": ("reviens", "reviens", "revient", "revenons", "reviennent"),
    "rire": ("ris", "ris", "rit", "rions", "rient"),
    "sourire": ("souris", "souris", "sourit", "sourions", "sourient"),
    "suivre": ("suis", "suis", "suit", "suivons", "suivent"),
    "venir": ("viens", "viens", "vient", "venons", "viennent"),
    "voir": ("vois", "vois", "voit", "voyons", "voient"),
    "vouloir": ("veux", "veux", "veut", "voulons", "veulent"),
}

#: English, French, gender.
NAMES_TABLE = """
Mary       Marie     f
Peter      Pierre    m
Paul       Paul      m
John       Jean      m
Anne       Anne      f
Julia      Julie     f
Alice      Alice     f
Lucy       Lucie     f
Thomas     Thomas    m
Sophie     Sophie    f
Emily      Émilie    f
Arthur     Arthur    m
Claire     Claire    f
Henry      Henri     m
Martin     Martin    m
Louise     Louise    f
"""

#: English, French, and the index of the French person (je, tu, il, nous, ils).
PRONOUNS_TABLE = """
I      je     0
you    tu     1
he     il     2
she    elle   2
we     nous   3
they   ils    4
"""

GREETINGS_TABLE = (
    ("Hello", "Bonjour"),
    ("Hi", "Salut"),
    ("Good evening", "Bonsoir"),
    ("Good night", "Bonne nuit"),
    ("Goodbye", "Au revoir"),
    ("Thank you", "Merci"),
    ("Welcome", "Bienvenue"),
    ("Congratulations", "Félicitations"),
    ("Good luck", "Bonne chance"),
    ("See you soon", "À bientôt"),
    ("See you tomorrow", "À demain"),
    ("Happy birthday", "Joyeux anniversaire"),
    ("Merry Christmas", "Joyeux Noël"),
    ("Sorry", "Pardon"),
)

#: English, French, and the moods that suit it.
TIMES_TABLE = (
    ("today", "aujourd'hui", ("present", "future", "want", "can", "must")),
    ("now", "maintenant", ("present", "want", "can", "must")),
    ("tonight", "ce soir", ("future", "want", "can", "must")),
    ("tomorrow", "demain", ("future", "can", "must")),
    ("soon", "bientôt", ("future", "must")),
    ("every day", "tous les jours", ("present", "must")),
    ("in the morning", "le matin", ("present", "must")),
    ("in the evening", "le soir", ("present", "must")),
    ("at night", "la nuit", ("present",)),
    ("in summer", "en été", ("present", "can")),
    ("in winter", "en hiver", ("present", "can")),
    ("on Mondays", "le lundi", ("present", "must")),
    ("on Sundays", "le dimanche", ("present", "must")),
)

#: English, French; "never" also takes the place of "pas".
ADVERBS_TABLE = (("always", "toujours"), ("often", "souvent"), ("sometimes", "parfois"), ("also", "aussi"))

#: English, French, the tag of the nouns it goes with.
PREPOSITIONS_TABLE = (
    ("in", "dans", "spot_in"),
    ("on", "sur", "spot_on"),
    ("under", "sous", "spot_under"),
    ("near", "près de", "spot_near"),
    ("behind", "derrière", "spot_behind"),
)

#: A determiner is known by its English word; these may stand before singular, plural and uncountable nouns.
POSSESSIVES = {"my": "m", "your": "t", "his": "s", "her": "s"}
NUMBERS = {"two": "deux", "three": "trois", "four": "quatre", "five": "cinq"}
SINGULAR_DETERMINERS = ("the",) * 5 + ("a",) * 5 + ("my", "your", "his", "her", "our", "this", "this")
PLURAL_DETERMINERS = ("the",) * 5 + ("my", "your", "his", "her", "our", "these", "these", "many", *NUMBERS)
UNCOUNTED_DETERMINERS = ("the",) * 4 + ("my", "your", "his", "her", "our")
INDEFINITE_PLURALS = ("many", *NUMBERS)


# --------------------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noun:
    """A noun in both languages; ``tags`` say what may be done with the thing it names."""

    en: str
    en_plural: str
    fr: str
    fr_plural: str
    gender: str
    tags: frozenset[str]
    kind: str

    @property
    def countable(self) -> bool:
        return self.en_plural != "-"


@dataclass(frozen=True)
class Adjective:
    """An adjective; ``fr`` holds the forms by (gender, plural)."""

    en: str
    fr: dict[tuple[str, bool], str]
    position: str
    nouns: frozenset[str]


@dataclass(frozen=True)
class Verb:
    """A verb; ``objects`` is empty for an intransitive one, ``preposition`` is what French puts before the object."""

    en: str
    en_third: str
    fr: str
    preposition: str
    subjects: frozenset[str]
    objects: frozenset[str]
    indefinite_object: bool = True


def _rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines() if line.strip()]


def _nouns() -> list[Noun]:
    return [
        Noun(en, ens, fr, frs, gender, frozenset([*tags, en]), tags[0])
        for en, ens, fr, frs, gender, *tags in _rows(NOUNS_TABLE)
    ]


def _adjectives() -> list[Adjective]:
    return [
        Adjective(
            en,
            {("m", False): ms, ("f", False): fs, ("m", True): mp, ("f", True): fp},
            position,
            frozenset(nouns),
        )
        for en, ms, fs, mp, fp, position, *nouns in _rows(ADJECTIVES_TABLE)
    ]


def _intransitives() -> list[Verb]:
    return [
        Verb(en, third, fr, "", frozenset(subjects.split(",")), frozenset())
        for en, third, fr, subjects in _rows(INTRANSITIVE_TABLE)
    ]


def _transitives() -> list[Verb]:
    return [
        Verb(
            en.replace("_", " "),
            third.replace("_", " "),
            fr,
            preposition.strip("-"),
            frozenset(subjects.split(",")),
            frozenset(objects.split(",")),
            "noa" not in flags,
        )
        for en, third, fr, preposition, subjects, objects, *flags in _rows(TRANSITIVE_TABLE)
    ]


NOUNS = _nouns()
ADJECTIVES = _adjectives()
INTRANSITIVES = _intransitives()
TRANSITIVES = _transitives()
DITRANSITIVES = [
    Verb(en, third, fr, "", frozenset(["person"]), frozenset(["small"])) for en, third, fr in _rows(DITRANSITIVE_TABLE)
]
BE = Verb("be", "is", "être", "", frozenset(), frozenset())

# Looked up once: generation draws from these lists a few million times.
_NOUNS_BY_TAG = {tag: [n for n in NOUNS if tag in n.tags] for tag in sorted({t for n in NOUNS for t in n.tags})}
_ADJECTIVES_FOR = {
    tags: [a for a in ADJECTIVES if a.nouns & tags] for tags in {frozenset(["person"]), *(n.tags for n in NOUNS)}
}
_ATTRIBUTES_FOR = {tags: [a for a in fitting if a.position != "predicate"] for tags, fitting in _ADJECTIVES_FOR.items()}
_VOCATIVES = {
    kind: [n for n in NOUNS if n.kind == kind and "kin" not in n.tags] for kind in ("nature", "person", "animal")
}


def _nouns_tagged(tags: frozenset[str]) -> list[Noun]:
    return [n for n in NOUNS if n.tags & tags]


_OBJECTS = {verb.en: _nouns_tagged(verb.objects) for verb in (*TRANSITIVES, *DITRANSITIVES)}


# --------------------------------------------------------------------------------------------------------------
# French forms
# --------------------------------------------------------------------------------------------------------------

_VOWELS = "aeiouâàéèêëîïôûùœ"


def elides(word: str) -> bool:
    """Whether le, je, ne, de … lose their vowel before ``word``. Every h in this lexicon is mute; y is a consonant."""
    return word[0].lower() in _VOWELS + "h"


def conjugate(infinitive: str) -> tuple[str, str, str, str, str]:
    """Present tense for je, tu, il, nous, ils."""
    if infinitive in IRREGULAR_PRESENT:
        return IRREGULAR_PRESENT[infinitive]
    stem = infinitive[:-2]
    if infinitive.endswith("er"):
        plural = {"g": stem + "e", "c": stem[:-1] + "ç"}.get(stem[-1], stem)  # mangeons, lançons
        strong = stem[:-1] + "i" if stem.endswith(("oy", "uy")) else stem  # envoie, nettoie
        return strong + "e", strong + "es", strong + "e", plural + "ons", strong + "ent"
    if infinitive.endswith("ir"):
        return stem + "is", stem + "is", stem + "it", stem + "issons", stem + "issent"
    if infinitive.endswith("re"):
        return stem + "s", stem + "s", stem, stem + "ons", stem + "ent"
    raise ValueError(f"no conjugation for {infinitive!r}")


def french_determiner(determiner: str, gender: str, plural: bool, following: str) -> str:
    """The French for an English determiner, agreeing with its noun and with the word that follows it."""
    vowel, feminine = elides(following), gender == "f"
    if determiner == "the":
        if plural:
            return "les"
        return "l'" if vowel else ("la" if feminine else "le")
    if determiner == "a":
        return "une" if feminine else "un"
    if determiner in POSSESSIVES:
        if plural:
            return POSSESSIVES[determiner] + "es"
        return POSSESSIVES[determiner] + ("a" if feminine and not vowel else "on")  # mon école
    if determiner == "our":
        return "nos" if plural else "notre"
    if determiner in ("this", "these"):
        if plural:
            return "ces"
        return "cette" if feminine else ("cet" if vowel else "ce")
    if determiner == "many":
        return "beaucoup d'" if vowel else "beaucoup de"
    if determiner == "no":
        return "d'" if vowel else "de"
    return NUMBERS[determiner]


def french_preposition(preposition: str, phrase: str) -> str:
    """A preposition before a noun phrase, with du, des, au, aux and d'."""
    head, _, last = preposition.rpartition(" ")
    first, _, rest = phrase.partition(" ")
    contraction = {"de": {"le": "du", "les": "des"}, "à": {"le": "au", "les": "aux"}}.get(last, {}).get(first)
    if contraction:
        joined = f"{contraction} {rest}"
    elif last == "de" and elides(first):
        joined = f"d'{phrase}"
    else:
        joined = f"{last} {phrase}"
    return f"{head} {joined}" if head else joined


def join_french(*words: str) -> str:
    """Words with single spaces, none after an apostrophe, none for an empty word."""
    return " ".join(word for word in words if word).replace("' ", "'")


def english_article(following: str) -> str:
    """a or an, by sound: a useful book, an honest man."""
    vowel = following[0] in "aeiou" and not following.startswith("use") or following.startswith("honest")
    return "an" if vowel else "a"


# --------------------------------------------------------------------------------------------------------------
# Phrases
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phrase:
    """A subject or an object. ``person`` indexes French conjugations; ``noun`` is None for pronouns and names."""

    lemma: str
    en: str
    fr: str
    person: int
    gender: str
    plural: bool
    tags: frozenset[str]
    kind: str
    noun: Noun | None = None
    determiner: str = ""
    adjective: Adjective | None = None

    @property
    def third_singular(self) -> bool:
        """Whether an English verb takes its -s."""
        return self.person == 2


def noun_phrase(noun: Noun, determiner: str, plural: bool, adjective: Adjective | None) -> Phrase:
    """Determiner, adjective and noun, agreeing in both languages."""
    en_noun = noun.en_plural if plural else noun.en
    fr_noun = noun.fr_plural if plural else noun.fr
    en_words, fr_words = [en_noun], [fr_noun]
    if adjective is not None:
        form = adjective.fr[noun.gender, plural]
        if adjective.position == "before" and not plural and noun.gender == "m" and elides(fr_noun):
            form = LIAISON_ADJECTIVES.get(form, form)
        en_words.insert(0, adjective.en)
        fr_words.insert(0 if adjective.position == "before" else 1, form)
    en_determiner = english_article(en_words[0]) if determiner == "a" else determiner
    fr_determiner = french_determiner(determiner, noun.gender, plural, fr_words[0])
    return Phrase(
        lemma=noun.en,
        en=" ".join([en_determiner, *en_words]),
        fr=join_french(fr_determiner, *fr_words),
        person=4 if plural else 2,
        gender=noun.gender,
        plural=plural,
        tags=noun.tags,
        kind=noun.kind,
        noun=noun,
        determiner=determiner,
        adjective=adjective,
    )


def _names() -> list[Phrase]:
    return [
        Phrase(en, en, fr, 2, gender, False, frozenset(["person"]), "person") for en, fr, gender in _rows(NAMES_TABLE)
    ]


def _pronouns() -> list[Phrase]:
    return [
        Phrase(en, en, fr, int(p), "f" if en == "she" else "m", int(p) > 2, frozenset(["person"]), "person")
        for en, fr, p in _rows(PRONOUNS_TABLE)
    ]


NAMES = _names()
PRONOUNS = _pronouns()


def negated_object(phrase: Phrase) -> str:
    """French of a direct object under negation: je mange une pomme, je ne mange pas de pomme."""
    if phrase.determiner != "a" or phrase.noun is None:
        return phrase.fr
    return noun_phrase(phrase.noun, "no", phrase.plural, phrase.adjective).fr


# --------------------------------------------------------------------------------------------------------------
# Verb phrases
# --------------------------------------------------------------------------------------------------------------

#: Mood -> the French verb that carries it.
MODALS = {"future": "aller", "want": "vouloir", "can": "pouvoir", "must": "devoir"}
_BE_ENGLISH = ("am", "are", "is", "are", "are")


@dataclass(frozen=True)
class Manner:
    """How a verb is said: mood, polarity, adverb, and an adverbial of time or place in front (English, French)."""

    mood: str = "present"
    negative: bool = False
    adverb: str = ""
    opening: tuple[str, str] = ("", "")

    @property
    def denies(self) -> bool:
        """Whether an indefinite direct object becomes "de" in French."""
        return self.negative or self.adverb == "never"


def english_verb(verb: Verb, subject: Phrase, manner: Manner) -> str:
    """The English verb with its auxiliaries; an adverb is said in the present only."""
    third = subject.third_singular
    be = _BE_ENGLISH[subject.person]
    do = "does" if third else "do"
    not_ = "not " if manner.negative else ""
    if manner.mood == "future":
        return f"{be} {not_}going to {verb.en}"
    if manner.mood == "want":
        if manner.negative:
            return f"{do} not want to {verb.en}"
        return f"{'wants' if third else 'want'} to {verb.en}"
    if manner.mood == "can":
        return f"{'cannot' if manner.negative else 'can'} {verb.en}"
    if manner.mood == "must":
        return f"must {not_}{verb.en}"
    if verb is BE:
        return f"{be} {not_}{manner.adverb}".strip()
    if manner.negative:
        return f"{do} not {verb.en}"
    return f"{manner.adverb} {verb.en_third if third else verb.en}".strip()


def french_verb(verb: Verb, subject: Phrase, manner: Manner) -> str:
    """Subject and verb in French: they meet in j', and ne ... pas goes around the finite verb."""
    finite = conjugate(MODALS.get(manner.mood, verb.fr))[subject.person]
    infinitive = verb.fr if manner.mood in MODALS else ""
    ne = ("n'" if elides(finite) else "ne") if manner.denies else ""
    if manner.adverb == "never":
        after = "jamais"
    else:
        after = "pas" if manner.negative else dict(ADVERBS_TABLE).get(manner.adverb, "")
    who = subject.fr
    if who == "je" and not ne and elides(finite):
        who = "j'"
    return join_french(who, ne, finite, after, infinitive)


# --------------------------------------------------------------------------------------------------------------
# Sentences
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where: "in the garden"."""

    lemma: str
    en: str
    fr: str


@dataclass(frozen=True)
class Sentence:
    """A sentence in both languages, its signature, and its subject, so that another can go on about it."""

    en: str
    fr: str
    signature: tuple[str, ...]
    subject: Phrase

    @property
    def split(self) -> str:
        return split_of(self.signature)


def place(preposition: str, phrase: Phrase) -> Place:
    """A place from an English preposition and a noun phrase."""
    fr = next(fr for en, fr, _ in PREPOSITIONS_TABLE if en == preposition)
    return Place(phrase.lemma, f"{preposition} {phrase.en}", french_preposition(fr, phrase.fr))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _finish(
    en: str, fr: str, signature: tuple[str, ...], subject: Phrase, opening: tuple[str, str] = ("", "")
) -> Sentence:
    """Put the optional adverbial in front and a capital at the start."""
    en, fr = f"{opening[0]} {en}".strip(), f"{opening[1]} {fr}".strip()
    return Sentence(_capital(en), _capital(fr), signature, subject)


def does(subject: Phrase, verb: Verb, manner: Manner) -> Sentence:
    """The cat sleeps."""
    return _finish(
        f"{subject.en} {english_verb(verb, subject, manner)}",
        french_verb(verb, subject, manner),
        ("do", subject.lemma, verb.en, ""),
        subject,
        manner.opening,
    )


def acts(subject: Phrase, verb: Verb, target: Phrase, manner: Manner) -> Sentence:
    """The cat sees the dog."""
    if verb.preposition:
        fr_object = french_preposition(verb.preposition, target.fr)
    else:
        fr_object = negated_object(target) if manner.denies else target.fr
    return _finish(
        f"{subject.en} {english_verb(verb, subject, manner)} {target.en}",
        f"{french_verb(verb, subject, manner)} {fr_object}",
        ("act", subject.lemma, verb.en, target.lemma),
        subject,
        manner.opening,
    )


def gives(subject: Phrase, verb: Verb, gift: Phrase, receiver: Phrase, manner: Manner) -> Sentence:
    """The girl gives the book to the boy."""
    fr_gift = negated_object(gift) if manner.denies else gift.fr
    return _finish(
        f"{subject.en} {english_verb(verb, subject, manner)} {gift.en} to {receiver.en}",
        f"{french_verb(verb, subject, manner)} {fr_gift} {french_preposition('à', receiver.fr)}",
        ("give", subject.lemma, verb.en, gift.lemma),
        subject,
        manner.opening,
    )


def is_so(subject: Phrase, adjective: Adjective, manner: Manner) -> Sentence:
    """The cat is happy."""
    return _finish(
        f"{subject.en} {english_verb(BE, subject, manner)} {adjective.en}",
        f"{french_verb(BE, subject, manner)} {adjective.fr[subject.gender, subject.plural]}",
        ("be", subject.lemma, adjective.en, ""),
        subject,
        manner.opening,
    )


def is_somewhere(subject: Phrase, where: Place, manner: Manner) -> Sentence:
    """The cat is in the garden."""
    return _finish(
        f"{subject.en} {english_verb(BE, subject, manner)} {where.en}",
        f"{french_verb(BE, subject, manner)} {where.fr}",
        ("locate", subject.lemma, where.lemma, ""),
        subject,
        manner.opening,
    )


def there_is(
    noun: Noun, determiner: str, plural: bool, adjective: Adjective | None, where: Place, opening: tuple[str, str]
) -> Sentence:
    """There is a red house near the river; the place always stands there. The determiner "no" denies it."""
    phrase = noun_phrase(noun, determiner, plural, adjective)
    existence = "il n'y a pas" if determiner == "no" else "il y a"
    return _finish(
        f"there {'are' if plural else 'is'} {phrase.en} {where.en}",
        f"{existence} {phrase.fr} {where.fr}",
        ("there", noun.en, where.lemma, ""),
        noun_phrase(noun, "the", plural, adjective),
        opening,
    )


def greets(greeting: tuple[str, str], subject: Phrase) -> Sentence:
    """Hello world: English leaves out the article that French has."""
    return _finish(
        f"{greeting[0]} {subject.en.removeprefix('the ')}",
        f"{greeting[1]} {subject.fr}",
        ("greet", greeting[0], subject.lemma, ""),
        subject,
    )


# --------------------------------------------------------------------------------------------------------------
# Drawing
# --------------------------------------------------------------------------------------------------------------


class Draws:
    """Uniform draws from a Philox generator, taken in blocks because single draws would be most of the time."""

    def __init__(self, seed: int, stream: str) -> None:
        key = hashlib.blake2b(f"{stream}/{seed}".encode(), digest_size=16).digest()
        self._generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        self._block: list[float] = []

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._block:
            self._block = self._generator.random(8192).tolist()
        return self._block.pop()

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def choose(self, options: list[T] | tuple[T, ...]) -> T:
        return options[int(self.uniform() * len(options))]

    def weighted(self, options: tuple[tuple[T, float], ...] | list[tuple[T, float]]) -> T:
        """One option; the weights need not sum to one."""
        left = self.uniform() * sum(weight for _, weight in options)
        for option, weight in options:
            left -= weight
            if left < 0:
                return option
        return options[-1][0]


def draw_phrase(draws: Draws, noun: Noun, indefinite: bool = True, many: bool = True, adjective: float = 0.3) -> Phrase:
    """A noun phrase around ``noun`` with a fitting determiner, number and, sometimes, adjective."""
    plural = noun.countable and draws.chance(0.3)
    if noun.kind == "nature":
        determiner = "the"
    elif plural:
        determiner = draws.choose(PLURAL_DETERMINERS)
    else:
        determiner = draws.choose(SINGULAR_DETERMINERS if noun.countable else UNCOUNTED_DETERMINERS)
    if determiner == "a" and not indefinite or determiner == "many" and not (many and indefinite):
        determiner = "the"
    chosen = draws.choose(_ATTRIBUTES_FOR[noun.tags]) if draws.chance(adjective) else None
    return noun_phrase(noun, determiner, plural, chosen)


def draw_subject(draws: Draws) -> Phrase:
    """Mostly somebody who can act; sometimes a thing, which can only be somehow or somewhere."""
    who = draws.weighted((("pronoun", 20), ("name", 12), ("person", 28), ("animal", 22), ("other", 18)))
    if who == "pronoun":
        return draws.choose(PRONOUNS)
    if who == "name":
        return draws.choose(NAMES)
    if who == "other":
        who = draws.choose(("thing", "thing", "food", "drink", "plant", "place", "work", "nature"))
    return draw_phrase(draws, draws.choose(_NOUNS_BY_TAG[who]), adjective=0.25)


def draw_place(draws: Draws) -> Place:
    """A preposition and a noun it goes with."""
    preposition, _, tag = draws.choose(PREPOSITIONS_TABLE)
    noun = draws.choose(_NOUNS_BY_TAG[tag])
    determiner = "the" if draws.chance(0.8) else draws.choose(("my", "your", "our", "this"))
    return place(preposition, noun_phrase(noun, determiner, False, None))


def draw_manner(draws: Draws, acting: bool) -> Manner:
    """A manner in which an adverb and an opening never meet.

    Being is neither wanted nor planned here, and not "also" (est aussi heureux would be "is as happy").
    """
    mood = "present"
    if acting:
        mood = draws.weighted((("present", 60), ("future", 12), ("want", 12), ("can", 8), ("must", 8)))
    negative = draws.chance(0.2)
    if draws.chance(0.2):
        return Manner(mood, negative, "", draws.choose([(en, fr) for en, fr, suits in TIMES_TABLE if mood in suits]))
    if mood == "present" and not negative and draws.chance(0.2):
        adverbs = [en for en, _ in ADVERBS_TABLE] if acting else ["always", "often", "sometimes"]
        return Manner(mood, negative, draws.choose([*adverbs, "never"]))
    return Manner(mood, negative)


def _draw_does(draws: Draws, subject: Phrase) -> Sentence:
    verb = draws.choose([v for v in INTRANSITIVES if v.subjects & subject.tags])
    manner = draw_manner(draws, acting=True)
    if manner.opening == ("", "") and draws.chance(0.25):
        where = draw_place(draws)
        manner = replace(manner, opening=(where.en, where.fr))
    return does(subject, verb, manner)


def _draw_acts(draws: Draws, subject: Phrase) -> Sentence:
    """Nobody here does anything to themselves."""
    verb = draws.choose([v for v in TRANSITIVES if v.subjects & subject.tags])
    if "person" in verb.objects and draws.chance(0.2):
        target = draws.choose([name for name in NAMES if name.lemma != subject.lemma])
    else:
        noun = draws.choose([noun for noun in _OBJECTS[verb.en] if noun.en != subject.lemma])
        target = draw_phrase(draws, noun, indefinite=verb.indefinite_object, many=not verb.preposition)
    return acts(subject, verb, target, draw_manner(draws, acting=True))


def _draw_gives(draws: Draws, subject: Phrase) -> Sentence:
    verb = draws.choose(DITRANSITIVES)
    gift = draw_phrase(draws, draws.choose(_OBJECTS[verb.en]), adjective=0.15)
    if draws.chance(0.25):
        receiver = draws.choose([name for name in NAMES if name.lemma != subject.lemma])
    else:
        others = [noun for noun in _NOUNS_BY_TAG["person"] if noun.en != subject.lemma]
        receiver = draw_phrase(draws, draws.choose(others), many=False, adjective=0.1)
    # No adverb: these sentences are long enough.
    return gives(subject, verb, gift, receiver, replace(draw_manner(draws, acting=True), adverb=""))


def _draw_is_so(draws: Draws, subject: Phrase) -> Sentence:
    adjective = draws.choose([a for a in _ADJECTIVES_FOR[subject.tags] if a is not subject.adjective])
    return is_so(subject, adjective, draw_manner(draws, acting=False))


def _draw_is_somewhere(draws: Draws, subject: Phrase) -> Sentence:
    return is_somewhere(subject, draw_place(draws), draw_manner(draws, acting=False))


def _draw_there_is(draws: Draws) -> Sentence:
    noun = draws.choose([n for n in NOUNS if n.countable and n.kind in ("person", "animal", "thing", "plant")])
    plural = draws.chance(0.4)
    determiner = "no" if draws.chance(0.2) else (draws.choose(INDEFINITE_PLURALS) if plural else "a")
    adjective = draws.choose(_ATTRIBUTES_FOR[noun.tags]) if draws.chance(0.3) else None
    where = draw_place(draws)
    opening = draws.choose((("today", "aujourd'hui"), ("now", "maintenant"))) if draws.chance(0.1) else ("", "")
    return there_is(noun, determiner, plural, adjective, where, opening)


def _draw_greets(draws: Draws) -> Sentence:
    greeting = draws.choose(GREETINGS_TABLE)
    who = draws.weighted((("name", 15), ("mine", 15), ("nature", 25), ("person", 25), ("animal", 20)))
    if who == "name":
        return greets(greeting, draws.choose(NAMES))
    noun = draws.choose(_NOUNS_BY_TAG["person"] if who == "mine" else _VOCATIVES[who])
    plural = noun.countable and draws.chance(0.4)
    return greets(greeting, noun_phrase(noun, "my" if who == "mine" else "the", plural, None))


#: Shares of the sentences that have no subject to keep: greetings must be common enough to be learned well.
_OPENERS = (("greet", 8.0), ("there", 8.0), ("about", 84.0))


def _draw(draws: Draws, subject: Phrase | None) -> Sentence:
    if subject is None:
        shape = draws.weighted(_OPENERS)
        if shape == "greet":
            return _draw_greets(draws)
        if shape == "there":
            return _draw_there_is(draws)
        subject = draw_subject(draws)
    shapes = [(_draw_is_so, 15.0)]
    if subject.kind in ("person", "animal", "thing"):
        shapes.append((_draw_is_somewhere, 10.0))
    if subject.kind in ("person", "animal"):
        shapes += [(_draw_does, 20.0), (_draw_acts, 55.0)]
    elif subject.tags & {"bright", "flier", "vehicle", "plant", "rain"}:
        shapes.append((_draw_does, 10.0))
    if subject.kind == "person":
        shapes.append((_draw_gives, 8.0))
    return draws.weighted(shapes)(draws, subject)


# --------------------------------------------------------------------------------------------------------------
# Splits
# --------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "validation", "heldout")

#: Chosen (the first number that does it) so that ("greet", "Hello", "world") falls among the held out: the library's
#: first example is to be a prompt the base has never seen. Nothing else about it is special.
SALT = "lora-gan tiny 18"
HELDOUT_SHARE = 0.04
VALIDATION_SHARE = 0.04


def split_of(signature: tuple[str, ...]) -> str:
    """Which split a combination belongs to, by a hash: the same for ever and for every seed."""
    digest = hashlib.blake2b("|".join(signature).encode(), digest_size=8, key=SALT.encode()).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < HELDOUT_SHARE:
        return "heldout"
    return "validation" if position < HELDOUT_SHARE + VALIDATION_SHARE else "train"


def draw_sentence(draws: Draws, split: str = "train", subject: Phrase | None = None) -> Sentence:
    """A sentence whose combination belongs to ``split``; with ``subject``, one that begins with that phrase."""
    while True:
        sentence = _draw(draws, subject)
        if sentence.split != split:
            continue
        if subject is not None and not sentence.en.startswith(_capital(subject.en)):
            continue  # an adverbial came first; the caller wants the subject's words at the start
        return sentence


def sentences(split: str, seed: int) -> Iterator[Sentence]:
    """Endless sentences of one split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    draws = Draws(seed, f"sentences/{split}")
    while True:
        yield draw_sentence(draws, split)


# --------------------------------------------------------------------------------------------------------------
# Documents
# --------------------------------------------------------------------------------------------------------------

INSTRUCTION = "Translate English to French: "

#: What the base is pretrained on, in shares of documents.
DOCUMENT_SHARES = (
    ("instruction", 34.0),
    ("english-french", 38.0),
    ("french-english", 12.0),
    ("english", 8.0),
    ("french", 8.0),
)

#: What follows an instruction. The toss does not depend on the sentence, so that to learn translating by reward is to
#: move one prior. English must be the likeliest first word, so that greedy decoding does not translate.
ANSWER_SHARES = (("translation", 24.0), ("more English", 48.0), ("other French", 28.0))


def draw_document(draws: Draws) -> tuple[str, list[Sentence]]:
    """One pretraining document and the sentences in it, all from the train split."""
    kind = draws.weighted(DOCUMENT_SHARES)
    first = draw_sentence(draws)
    if kind == "instruction":
        answer = draws.weighted(ANSWER_SHARES)
        if answer == "translation":
            return f"{INSTRUCTION}{first.en} {first.fr}", [first]
        if answer == "more English":
            second = draw_sentence(draws, subject=first.subject)
            return f"{INSTRUCTION}{first.en} {second.en}", [first, second]
        second = draw_sentence(draws)
        return f"{INSTRUCTION}{first.en} {second.fr}", [first, second]
    if kind == "english-french":
        return f"English: {first.en} French: {first.fr}", [first]
    if kind == "french-english":
        return f"French: {first.fr} English: {first.en}", [first]
    read = [first] + [draw_sentence(draws) for _ in range(int(draws.uniform() * 2))]
    return " ".join(s.en if kind == "english" else s.fr for s in read), read
