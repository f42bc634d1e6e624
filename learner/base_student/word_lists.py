"""Common English and Python words, written by hand: what the generic text is made of and the tokenizer knows.

Not a vocabulary of any task: everyday words by part of speech, so that `generic_text` can build plain sentences.

    >>> "lantern" in NOUNS
"""

FUNCTION_WORDS = """
the a an of to in on at by for from with without about above across after against along among around as before behind
below beneath beside between beyond but despite down during except inside into like near next off onto out outside
over past per since than that then there these this those through throughout till toward under until up upon via while
within and or nor so yet if because though although unless whether either neither both each every all any some none
one two three four five six seven eight nine ten first second third last other another such same own only just even
still also too very quite rather more most much many less least few little several enough no not never always often
sometimes usually again once twice here now later soon today who whom whose which what when where why how i you he she
it we they me him her us them my your his its our their is are was were be been being am do does did done have has had
having can could will would shall should may might must let get got make made use used new old equally remaining total
times half double number amount value result answer question final exactly itself apart together altogether
""".split()

NOUNS = """
harbor river garden mirror tower forest letter crown bridge lantern mountain road island window clock orchard shadow
song desert compass feather castle ocean valley station library candle storm voyage meadow table chair door roof wall
floor lamp basket bucket barrel wagon boat sail anchor rope ladder hammer needle thread cloth coat glove boot hat ring
chain key lock coin stamp book page map chart paper pencil brush paint stone brick sand clay iron copper silver gold
glass wood leaf branch root seed flower grass tree bird horse wolf bear fox owl fish whale spider bee ant cat dog goat
sheep cow wheat barley rice bread butter cheese apple pear plum grape melon lemon honey salt sugar tea coffee soup
kettle bowl plate spoon fork knife cup bottle jar box crate sack parcel package ticket card shelf drawer cabinet
engine motor wheel pump pipe valve wire cable switch signal meter gauge dial panel screen sensor battery house hall
street square market village town city country kingdom empire coast beach lake pond stream spring well hill cliff cave
field farm barn mill forge mine quarry port dock pier school college university hospital museum theater temple church
palace prison court office factory warehouse store shop company bank press studio team crew guild council army fleet
club family person people man woman child friend guest neighbor teacher student doctor nurse judge lawyer engineer
architect painter poet writer author novelist singer actor composer director physicist chemist biologist scientist
explorer sailor captain pilot driver farmer baker butcher tailor weaver smith carpenter mason miner merchant trader
clerk mayor king queen prince founder owner member leader worker maker name title word line sentence story poem novel
film play music album picture photo note report record list entry item row column index code file folder data text
field key type group set pair part piece layer level step stage phase point place area region zone center side corner
edge end top bottom year month week day hour minute second morning noon evening night spring summer autumn winter time
date age birth death life height width length depth weight size speed distance price cost rate share count sum change
color colour shape sound tone light heat cold wind rain snow ice fire smoke dust water air earth sky star moon sun
planet marble shell nail pen ball toy doll drum flute violin award prize medal capital border language population
inhabitant employer employee profession birthplace publisher headquarters tool system project product industry motor
food airline lab science art history war peace law rule plan idea problem example
""".split()

ADJECTIVES = """
silver hidden broken golden silent crimson distant hollow burning frozen gentle ancient bitter wild pale quiet iron
velvet amber lost restless narrow winter scarlet stolen sunken bright endless fading lonely small large big tall short
long wide thin thick heavy light dark deep shallow high low fast slow early late warm cool dry wet soft hard rough
smooth sharp blunt round flat square straight curved red blue green yellow black white brown grey purple orange pink
plain rich poor full empty open closed clean dirty fresh stale sweet sour young strong weak brave calm kind proud rare
common simple complex public private local national royal sacred modern grand great little northern southern eastern
western upper lower inner outer central main single whole damaged equal extra free famous
""".split()

VERBS_PAST = """
crossed painted carried followed watched reached repaired moved opened closed measured marked climbed guarded visited
crossed described named called noted passed touched turned lifted lowered cleaned polished covered lit mapped chased
admired copied traced weighed tested checked planted watered cooked tasted washed dried folded wrapped tied pulled
pushed rolled dropped hid kept held left entered circled joined faced feared liked loved missed wanted needed heard
saw met knew drew
""".split()

OTHER_VERBS = """
buy buys bought sell sells sold give gives gave given take takes took find finds found lose loses lost keep keeps
arrive arrives send sends sent receive receives received start starts started begin begins began stop stops work works
worked live lives lived study studies studied born write writes wrote written read reads publish published direct
directed release released create created found founded base based locate located belong belongs employ employs attend
attended hold holds contain contains grow grows repeat repeats swap swapped pack packs split divide divided multiply
multiplied add added subtract subtracted remain remains share shared collect collects collection throw thrown apply
compute calculate search look need know see say says said show shows tell ask asks think come comes go goes went run
runs set call return returns print count counts check pick follow want open close move put bring buy earn pay pays
spend spends spent
""".split()

UNITS = """
metres grams litres seconds minutes hours days degrees volts miles steps pages points rows tons watts bars
""".split()

FIELD_NAMES = """
tone keeper shape grade label code motto patron emblem size depth rank shade crest seat guardian signal batch origin
model series level rating class weight height width color pattern material texture finish format channel section shelf
row zone owner builder carver tuner warden herald scribe steward chief rival partner ally
""".split()

PYTHON_WORDS = """
def return if elif else for while in range len print str int float list dict set tuple sum min max abs round sorted
reversed enumerate zip map filter any all import from as class self lambda not and or is None True False try except
finally raise with open assert pass break continue global yield del isinstance append extend items keys values join
split strip replace lower upper startswith endswith format index count sort insert pop update get x y z a b c i j n m
k v s t result total value values data name text line lines word words key item output answer Error NameError
TypeError ValueError SyntaxError IndexError KeyError ZeroDivisionError ImportError AttributeError TimeoutError
Traceback
""".split()
