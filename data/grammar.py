"""The words and phrases from which customer messages are made: one grammar for the tickets and for the pretraining dialogues.

A request is `opener + key phrase`. A key phrase is either a *wish* that continues "I would like to ..." or a *fact* that is a
clause of its own. `{p}` stands for the product. Phrases under `HELD_OUT_*` never occur in a training ticket; they make the
split `test_reworded`.
"""

PRODUCTS = (
    "desk lamp", "coffee maker", "office chair", "rain jacket", "water bottle", "phone case", "garden hose", "electric kettle",
    "yoga mat", "wall clock", "book shelf", "travel bag", "bread knife", "night light", "picture frame", "camping tent",
    "bike helmet", "wool blanket", "frying pan", "toy train", "table fan", "tea pot", "headset", "keyboard",
)  # fmt: skip

WISH_OPENERS = (
    "I would like to", "I want to", "I need to", "Can I", "Could I", "May I", "Please let me", "Is it possible to",
    "I am writing to", "I was hoping to", "How can I", "Kindly help me to", "My wish is to", "I have decided to",
)  # fmt: skip
FACT_OPENERS = (
    "I see that", "It seems that", "I noticed that", "I am sorry to say that", "Sadly,", "I have to report that",
    "Just so you know,", "My problem is that", "As it turns out,", "To my surprise,", "The thing is that", "I must tell you that",
)  # fmt: skip

# intent: (wishes, facts)
KEY_PHRASES = {
    "refund": (
        ("get my money back for the {p}", "have the {p} refunded", "return the {p} for a refund", "ask for a refund of the {p}",
         "receive a full refund for the {p}", "send the {p} back and be repaid", "claim back what I paid for the {p}",
         "give the {p} back and get the money", "get a refund on the {p}", "have my payment for the {p} returned",
         "be refunded for the {p}", "return the {p} and get my cash back"),
        ("I am still waiting for my money for the {p}", "the refund for the {p} has not come", "I expect a refund for the {p}",
         "you owe me the money for the {p}", "the {p} is not for me and I want my money", "the {p} was too costly and I want a refund"),
    ),
    "exchange": (
        ("swap the {p} for another one", "exchange the {p}", "change the {p} for a different colour", "trade the {p} for a bigger one",
         "get another {p} in place of this one", "exchange the {p} for a smaller size", "swap my {p} for the blue model",
         "return the {p} and take a different model", "have the {p} exchanged", "switch the {p} for the other version",
         "get the {p} in another size", "change my {p} for the red one"),
        ("the {p} is the wrong size and I want another one", "I would rather have the {p} in a different colour",
         "the {p} is too small so I need a bigger one", "an exchange of the {p} would help me", "the {p} does not fit and I want to swap it",
         "I picked the wrong model of the {p} and want the other one"),
    ),
    "cancel": (
        ("cancel the {p}", "cancel my order of the {p}", "stop the order for the {p}", "call off the purchase of the {p}",
         "withdraw my order for the {p}", "take back my order of the {p}", "cancel the {p} before it ships",
         "stop the {p} from being sent", "have the order for the {p} cancelled", "end my order of the {p}",
         "undo my purchase of the {p}", "drop the {p} from my order"),
        ("I no longer want the {p}", "the {p} should not be sent any more", "I ordered the {p} by mistake", "please do not ship the {p}",
         "I have changed my mind about the {p}", "my order of the {p} must be cancelled"),
    ),
    "delivery": (
        ("know where my {p} is", "find out when the {p} will arrive", "track the {p}", "ask when my {p} is coming",
         "learn where the parcel with the {p} is", "see the delivery date of the {p}", "check the delivery of the {p}",
         "hear when the {p} will be delivered", "follow the shipping of my {p}", "know why the {p} is late",
         "get the tracking number of the {p}", "find out how far the {p} has come"),
        ("the {p} has not arrived yet", "I am still waiting for the {p}", "my {p} is late", "the parcel with the {p} never came",
         "the {p} should have been here by now", "the delivery of the {p} is taking too long"),
    ),
    "damage": (
        ("report a broken {p}", "report damage to the {p}", "complain about a damaged {p}", "tell you about a crack in the {p}",
         "show you how the {p} was damaged", "report that the {p} is broken", "report a {p} that does not work",
         "complain that the {p} came in pieces", "let you know that the {p} is faulty", "report a fault in the {p}",
         "report a hole in the {p}", "complain about scratches on the {p}"),
        ("the {p} arrived broken", "the {p} is damaged", "the {p} has a crack in it", "the {p} stopped working", "the {p} came in pieces",
         "the {p} is badly scratched"),
    ),
    "missing": (
        ("report a missing part of the {p}", "tell you that a piece of the {p} is missing", "get the part that was not with the {p}",
         "ask for the missing screws of the {p}", "let you know that the {p} is not complete", "receive the rest of the {p}",
         "report that the box of the {p} was half empty", "get the manual that should be with the {p}",
         "report that the {p} came without its cable", "ask where the other half of the {p} is", "have the missing parts of the {p} sent",
         "report an incomplete {p}"),
        ("a part of the {p} is missing", "the {p} came without its lid", "the box of the {p} was not complete",
         "there were no screws with the {p}", "one piece of the {p} was not in the box", "the {p} lacks a part"),
    ),
    "invoice": (
        ("get an invoice for the {p}", "receive the bill for the {p}", "have a receipt for the {p}", "ask for the invoice of the {p}",
         "get a copy of the bill for the {p}", "download the receipt of the {p}", "have the invoice for the {p} sent again",
         "get proof of payment for the {p}", "see the bill of the {p}", "receive an invoice for the {p} with my tax number",
         "get the receipt for the {p} by mail", "ask for a bill for the {p}"),
        ("there was no invoice with the {p}", "I never got a receipt for the {p}", "the bill for the {p} is missing its date",
         "my tax office wants the invoice for the {p}", "I lost the receipt for the {p}", "the invoice for the {p} has the wrong name"),
    ),
    "address": (
        ("change the address for the {p}", "send the {p} to a new address", "have the {p} sent to my office",
         "update where the {p} is to be sent", "correct the street for the {p}", "ship the {p} to another address",
         "use a different address for the {p}", "give you a new address for the {p}", "have the {p} brought to my neighbour",
         "correct the house number for the {p}", "redirect the {p} to my new home", "move the {p} to another street"),
        ("I have moved and the {p} must go to my new home", "the address for the {p} is wrong", "the {p} is going to my old address",
         "I gave the wrong street for the {p}", "the house number for the {p} is not right", "the {p} should go to another city"),
    ),
}  # fmt: skip

HELD_OUT_KEY_PHRASES = {
    "refund": (
        ("be paid back for the {p}", "see my money again for the {p}", "get the price of the {p} back on my card"),
        ("the {p} disappointed me and I want to be repaid", "my money for the {p} is still with you"),
    ),
    "exchange": (
        ("turn in the {p} and pick another model", "replace the {p} with a larger size", "have a different {p} in return for mine"),
        ("another colour of the {p} would suit me better", "the {p} is too big, so a smaller one please"),
    ),
    "cancel": (
        ("annul the purchase of the {p}", "back out of buying the {p}", "have you forget my order for the {p}"),
        ("I do not need the {p} after all", "the {p} was bought in error, so stop it"),
    ),
    "delivery": (
        ("know what is holding up the {p}", "ask how long the {p} will take to get here", "trace the package with the {p}"),
        ("there is still no sign of the {p}", "I have been expecting the {p} for days"),
    ),
    "damage": (
        ("tell you that the {p} fell apart", "make a complaint about a defect of the {p}", "report a {p} that is torn"),
        ("the {p} reached me in bad shape", "the {p} is defective"),
    ),
    "missing": (
        ("ask for what was left out of the {p}", "say that the {p} has something missing", "be sent the absent piece of the {p}"),
        ("not everything for the {p} was in the package", "I could not find all the pieces of the {p}"),
    ),
    "invoice": (
        ("have the paperwork for the payment of the {p}", "be sent a payment slip for the {p}", "print a bill of sale for the {p}"),
        ("my bookkeeper asks for the bill of the {p}", "I cannot find any receipt for the {p}"),
    ),
    "address": (
        ("have the {p} go somewhere else", "tell you where I live now so that the {p} finds me", "name another place to send the {p}"),
        ("we live in a new place now, so the {p} must go there", "the label of the {p} shows the wrong city"),
    ),
}  # fmt: skip

# Where the order id stands: `{r}` is the request, `{m}` its full stop or question mark, `{o}` the order id.
FRAMES = (
    "{r}, order {o}{m}", "{r} (order {o}){m}", "{r}{m} The order number is {o}.", "{r}{m} My order is {o}.", "{r}{m} It is order {o}.",
    "About order {o}: {r}{m}", "Order {o}. {r}{m}", "This is about {o}. {r}{m}", "My order number is {o}. {r}{m}", "{r}, my number is {o}{m}",
)  # fmt: skip

URGENCY = {
    "high": ("This is urgent.", "Please hurry.", "I need this solved today.", "It cannot wait.", "Please act at once.",
             "I need an answer right now.", "This is very pressing.", "Please be quick, it is urgent.",
             "I need help as soon as possible.", "Time is short.", "This has to be done today.", "Please treat it as urgent.",
             "I cannot wait any longer.", "It must be fixed now.", "Please do it right away.", "I am in a great hurry."),
    "normal": ("",),
    "low": ("There is no rush.", "Take your time.", "It is not urgent.", "No hurry at all.", "Whenever you find the time.",
            "This can wait.", "Next week is early enough.", "I am in no hurry.",
            "You need not hurry.", "It is fine to do it later.", "I do not mind waiting.", "Please do not rush.",
            "There is plenty of time.", "Next month will do.", "It has time.", "I am happy to wait."),
}  # fmt: skip
HELD_OUT_URGENCY = {
    "high": ("Every hour counts.", "Do it immediately, please.", "I must have this by tonight.", "This is an emergency."),
    "normal": ("",),
    "low": ("Any time is fine.", "I can be patient.", "It does not have to be soon.", "Deal with it later if you like."),
}  # fmt: skip

GREETINGS = ("", "", "", "Hello!", "Hi!", "Good morning.", "Dear team!", "Hi there!", "Good evening.", "Hello again.")
SMALL_TALK = (
    "", "", "", "", "", "I bought it for my sister.", "It was a gift.", "I have been a customer for years.", "The weather is awful here.",
    "I paid by card.", "I am a bit lost.", "My dog likes the box.", "Your shop is nice.",
)  # fmt: skip
CLOSINGS = ("", "", "", "Thanks.", "Thank you!", "Best wishes, Ann", "Regards, Tom", "Many thanks, Mia", "Bye.", "Cheers, Sam")
