"""What the simulated model can say: words, punctuation, and characters longer than a byte."""

from typing import Final

WORDS: Final = tuple(
    """
    a about above accepts account across act after again against age agree ahead all allow almost
    along also always among an and another answer any apart arrive as ask at away back balance
    bank basic batch be because become before begin behind believe below beside better between
    beyond bind block board book both bottom branch bring broad build burst but by cache call can
    care carry case catch cause center certain chain change check choice choose clean clear client
    clock close cluster code cold come common complete connect constant contain control copy core
    correct cost could count course cover create cross current cut data day deal decide deep demand
    deploy depth describe detail differ direct disk do does done door down drain draw drive drop
    during each early ease edge effect either else empty end engine enough enter equal error even
    event ever every exact except expect fact fail fair far fast few field file fill final find
    fine first fit flow follow for force form forward found four free fresh from front full further
    future gain general get give given glass go goal good grand great ground group grow half hand
    handle happen hard has have head health hear heart heavy help here high hold home hope host
    hour house how however idea if image in inside instead into is issue it its join judge just
    keep key kind know known land large last late later layer lead leader learn lease least leave
    left length less let letter level light like limit line link list little live load local long
    look loop lose lost low machine main make many map mark match matter may mean measure meet
    memory merge message might mind minute model moment more most move much must name near need
    never new next night node none normal not note nothing now number of off often old on once one
    only open operator or order other our out over own page pair part pass past path pattern people
    perhaps place plan play point policy poor possible power press price problem process promise
    proof proper prove proxy pull push put quality queue quick quiet quite range rate rather reach
    read ready real reason record recover reduce refuse release remain remember repair repeat
    replica reply request rest result return right ring rise road role room root round route rule
    run safe same save say scale search second see seem send sense serve set seven several shape
    share short should show side sign simple since single six size slow small so some soon sound
    source space speak speed split stand start state stay step still stop store stream strong such
    sure system table take task tell ten test than that the their them then there these they thing
    think this three through time to today together token too top total touch toward trace traffic
    true trust truth try turn two under until up upon use value very view visible wait walk want
    warm was watch water way we week well were what when where which while white who whole why wide
    will window wise with within without word work world would write year yes yet you your zone
    """.split()  # noqa: SIM905 - hundreds of quotes and commas would hide the words
)
"""Each is one token together with the space before it."""

CHARACTERS: Final = tuple("éüñçøß→…—“”§€日本語模型流星雨中文字かなアイ한국어привет🙂🚀🦊✓½")
"""Said byte by byte, one token a byte, so that streams are cut inside a character."""

ENDINGS: Final = (".", ",", ";", ":", "\n", " (", ")")
"""Punctuation; only a full stop can be followed by the end of the answer."""
