"""A small synthetic language: goods given as attribute lists, described in several voices.

A prompt is an attribute list in the form of AdvertiseGen, `品名#茶杯*颜色#天蓝*材质#陶瓷`. A
description is an opening, one sentence per attribute and a closing; each of the three parts speaks
in one voice. The base learns every voice and many mixtures of them; the sample that a prefix is
tuned on uses `SAMPLE_STYLE`, a mixture which the base never sees.
"""

import random
from dataclasses import dataclass

# value: (a word the sober voices use for it, a word the warm voices use for it)
Words = dict[str, tuple[str, str]]

COLOURS: Words = {
    "米白": ("干净", "温柔"),
    "天蓝": ("清爽", "明亮"),
    "墨绿": ("沉静", "耐看"),
    "酒红": ("浓郁", "热烈"),
    "浅灰": ("低调", "安静"),
    "藏青": ("稳重", "深远"),
    "鹅黄": ("鲜亮", "娇嫩"),
    "乌黑": ("利落", "神秘"),
    "桃粉": ("甜美", "可爱"),
    "卡其": ("大方", "随和"),
    "银白": ("明净", "闪亮"),
    "橙红": ("醒目", "热闹"),
}
PATTERNS: Words = {
    "条纹": ("整齐", "精神"),
    "格子": ("规整", "俏皮"),
    "碎花": ("细巧", "烂漫"),
    "纯色": ("简洁", "素净"),
    "刺绣": ("精致", "典雅"),
    "波点": ("活泼", "灵动"),
    "山水": ("清雅", "悠远"),
    "祥云": ("吉祥", "飘逸"),
    "几何": ("分明", "新潮"),
    "字母": ("时髦", "有趣"),
}
MANNERS: Words = {
    "简约": ("清楚", "舒心"),
    "复古": ("厚重", "怀旧"),
    "文艺": ("内敛", "浪漫"),
    "田园": ("朴素", "清新"),
    "中式": ("端庄", "古朴"),
    "北欧": ("明快", "自在"),
    "工业": ("硬朗", "酷"),
    "优雅": ("得体", "迷人"),
    "日系": ("淡雅", "恬静"),
    "休闲": ("轻松", "惬意"),
}
OCCASIONS: Words = {
    "上班": ("得力", "省心"),
    "旅行": ("方便", "开心"),
    "聚会": ("体面", "出彩"),
    "居家": ("实在", "温馨"),
    "送礼": ("合适", "贴心"),
    "读书": ("专注", "安宁"),
    "喝茶": ("从容", "悠闲"),
    "散步": ("轻快", "愉快"),
    "开学": ("及时", "雀跃"),
    "过年": ("应景", "喜庆"),
}


@dataclass(frozen=True)
class Category:
    items: tuple[str, ...]
    materials: Words
    features: Words


CATEGORIES = (
    Category(
        ("衬衫", "长裙", "毛衣", "外套", "围巾", "帽子"),
        {
            "棉麻": ("透气", "舒服"),
            "羊毛": ("保暖", "软和"),
            "真丝": ("顺滑", "轻盈"),
            "牛仔布": ("挺括", "帅气"),
            "灯芯绒": ("厚实", "暖和"),
            "雪纺": ("垂坠", "飘飘"),
        },
        {
            "不易起皱": ("平整", "省事"),
            "版型宽松": ("宽裕", "自由"),
            "可以机洗": ("易洗", "轻省"),
            "两面可用": ("多变", "百搭"),
            "防风防雨": ("可靠", "安心"),
        },
    ),
    Category(
        ("茶杯", "饭碗", "花瓶", "水壶", "果盘", "烛台"),
        {
            "陶瓷": ("温润", "细腻"),
            "玻璃": ("通透", "晶莹"),
            "竹子": ("天然", "清香"),
            "黄铜": ("沉实", "贵气"),
            "搪瓷": ("耐用", "光洁"),
            "紫砂": ("细密", "淳厚"),
        },
        {
            "不怕摔": ("坚固", "放心"),
            "容量很大": ("够用", "痛快"),
            "耐得住高温": ("安全", "踏实"),
            "手工制作": ("独特", "有心"),
            "容易清洗": ("卫生", "清爽"),
        },
    ),
    Category(
        ("背包", "提包", "钱包", "书包", "布袋", "行李箱"),
        {
            "帆布": ("耐磨", "轻便"),
            "牛皮": ("结实", "有型"),
            "尼龙": ("轻薄", "利索"),
            "绒布": ("细软", "亲切"),
            "草编": ("透风", "凉快"),
            "麻布": ("粗实", "质朴"),
        },
        {
            "夹层很多": ("有序", "整洁"),
            "能防泼水": ("防潮", "无忧"),
            "背带可调": ("合身", "贴合"),
            "拉链顺滑": ("灵活", "顺手"),
            "可以折叠": ("省地方", "小巧"),
        },
    ),
    Category(
        ("书架", "椅子", "台灯", "茶几", "衣柜", "屏风"),
        {
            "胡桃木": ("坚硬", "高贵"),
            "松木": ("环保", "芬芳"),
            "藤条": ("柔韧", "凉爽"),
            "铁艺": ("牢固", "别致"),
            "竹编": ("轻巧", "雅致"),
            "榉木": ("稳定", "平和"),
        },
        {
            "安装简单": ("快捷", "轻快"),
            "承重很好": ("牢靠", "稳当"),
            "不占地方": ("紧凑", "灵巧"),
            "高低可调": ("适用", "称心"),
            "边角圆润": ("无害", "温和"),
        },
    ),
)


@dataclass(frozen=True)
class Goods:
    """One article: its name and two to five attributes, in the order of the prompt."""

    item: str
    attributes: tuple[tuple[str, str, tuple[str, str]], ...]  # (key, value, words)

    def prompt(self) -> str:
        pairs = [("品名", self.item), *((key, value) for key, value, _ in self.attributes)]
        return "*".join(f"{key}#{value}" for key, value in pairs)

    def identity(self) -> frozenset[str]:
        """The same for two lists of the same attributes in another order."""
        return frozenset(self.prompt().split("*"))


@dataclass(frozen=True)
class Voice:
    tone: int  # 0 takes the sober word of a value, 1 the warm one
    openings: tuple[str, ...]
    sentences: dict[str, tuple[str, ...]]
    closings: tuple[str, ...]


VOICES = {
    "平实": Voice(
        0,
        ("这是一款{item}。", "今天介绍的是{item}。", "下面看看这款{item}。"),
        {
            "颜色": ("颜色是{value}，看起来{word}。", "它选用{value}，显得{word}。"),
            "材质": ("材质为{value}，摸起来{word}。", "它用{value}制成，比较{word}。"),
            "图案": ("上面有{value}图案，样子{word}。", "图案是{value}，整体{word}。"),
            "风格": ("风格偏{value}，感觉{word}。", "它属于{value}风格，很{word}。"),
            "场合": ("适合{value}，用着{word}。", "{value}时可以用，会很{word}。"),
            "特点": ("它{value}，因此{word}。", "特点是{value}，所以{word}。"),
        },
        ("需要的话可以了解一下。", "以上就是它的介绍。", "欢迎选购。"),
    ),
    "热情": Voice(
        1,
        (
            "快来看呀，超棒的{item}到货啦！",
            "哇，这款{item}真让人心动！",
            "等了好久，{item}终于上新啦！",
        ),
        {
            "颜色": ("{value}的颜色超级{word}哦！", "满眼都是{value}，{word}极了！"),
            "材质": ("{value}做的，{word}得不得了！", "居然是{value}哎，好{word}！"),
            "图案": ("{value}图案太{word}啦！", "配上{value}图案，真是{word}！"),
            "风格": ("{value}风格谁能不爱，{word}到家！", "妥妥的{value}风，{word}满分！"),
            "场合": ("{value}带上它，绝对{word}！", "{value}就靠它啦，特别{word}！"),
            "特点": ("而且{value}，简直太{word}！", "重点是{value}，{word}翻倍！"),
        },
        ("手慢就没有啦！", "赶紧带回家吧！", "喜欢就别犹豫啦！"),
    ),
    "诗意": Voice(
        1,
        ("风过窗前，想起一件{item}。", "时光很慢，{item}静静等着。", "一件{item}，藏着半个春天。"),
        {
            "颜色": (
                "{value}像初晴的天色，{word}地落在心上。",
                "那一抹{value}，把日子染得{word}。",
            ),
            "材质": ("指尖掠过{value}，有{word}的回声。", "{value}记得山野，{word}如旧时月光。"),
            "图案": ("{value}在上面轻轻生长，{word}如梦。", "谁把{value}写成了诗，字字{word}。"),
            "风格": ("{value}的气息缓缓散开，{word}似水。", "像一首{value}的歌，唱得{word}。"),
            "场合": ("{value}的时候有它，心里便{word}。", "愿你{value}的路上，都有{word}的光。"),
            "特点": ("{value}，是它不说出口的{word}。", "它说{value}，便有了{word}的模样。"),
        },
        ("愿它陪你走过四季。", "余下的美好，留给你慢慢读。", "且把岁月，轻轻收进怀里。"),
    ),
    "专业": Voice(
        0,
        ("产品说明：{item}一件。", "经检测，该{item}符合标准。", "本品为{item}，参数如下。"),
        {
            "颜色": ("色号{value}，视觉效果{word}；", "外观采用{value}色调，呈现{word}；"),
            "材质": ("主料{value}，物性{word}；", "选材为优质{value}，手感{word}；"),
            "图案": ("表面工艺为{value}，纹理{word}；", "装饰元素{value}，排布{word}；"),
            "风格": ("设计语言{value}，定位{word}；", "整体按{value}理念设计，表现{word}；"),
            "场合": ("使用场景{value}，评价{word}；", "推荐用于{value}，反馈{word}；"),
            "特点": ("核心性能{value}，结果{word}；", "实测{value}，等级{word}；"),
        },
        ("请按说明使用。", "质保期为一年。", "详情请咨询客服。"),
    ),
    "口语": Voice(
        0,
        (
            "我跟你说，这个{item}不错。",
            "上周买了个{item}，聊聊吧。",
            "朋友问我{item}咋样，我说行。",
        ),
        {
            "颜色": ("我挑的{value}，嗯，挺{word}的。", "{value}那个，看着蛮{word}。"),
            "材质": ("料子是{value}嘛，确实{word}。", "人家用的{value}，摸着还{word}。"),
            "图案": ("有点{value}，倒也{word}。", "那个{value}图案吧，算是{word}。"),
            "风格": ("走的{value}路子，我觉得{word}。", "反正就是{value}那种，还挺{word}。"),
            "场合": ("我一般{value}用，蛮{word}。", "{value}拿着正好，怪{word}的。"),
            "特点": ("关键它{value}，真的{word}。", "还有啊，{value}，挺{word}的。"),
        },
        ("街角那家小店就有。", "你自己看着办吧。", "改天来坐坐，借你试试。"),
    ),
    "掌柜": Voice(
        1,
        (
            "客官请留步，小店新进{item}一件。",
            "列位看官，且看这件{item}。",
            "话说这{item}，来头可不小。",
        ),
        {
            "颜色": ("您瞧这{value}，好生{word}。", "通体{value}，端的{word}。"),
            "材质": ("用的是上好的{value}，果然{word}。", "此物乃{value}所制，{word}非常。"),
            "图案": ("绣的画的皆是{value}，甚是{word}。", "但见{value}其上，何等{word}。"),
            "风格": ("这般{value}做派，叫人{word}。", "{value}之风扑面，好不{word}。"),
            "场合": ("若逢{value}，有它最是{word}。", "{value}之际取用，岂不{word}。"),
            "特点": ("更兼{value}，实在{word}。", "难得{value}，自然{word}。"),
        },
        ("价钱好说，客官里边请。", "童叟无欺，概不赊账。", "错过这村，可没这店。"),
    ),
}


@dataclass(frozen=True)
class Style:
    """Which voice speaks the opening, the sentences and the closing, and what is signed below."""

    opening: str
    body: str
    closing: str
    signature: str = ""

    def voices(self) -> tuple[str, str, str]:
        return self.opening, self.body, self.closing

    def cue(self) -> str:
        """How a prompt asks for this style."""
        if len(set(self.voices())) == 1:
            cue = f"请用{self.body}的口吻介绍"
        else:
            cue = f"开头{self.opening}，正文{self.body}，结尾{self.closing}，请介绍"
        return f"{cue}，署名{self.signature.split('，')[0]}" if self.signature else cue


SHOPS = ("街角小店", "巷口茶铺", "桥头布庄", "河边木坊", "山下杂货", "镇上老铺")
INVITATIONS = ("等你来坐坐", "常来走走", "欢迎再来", "改天再聊", "请多关照")
SIGNATURES = tuple(f"{shop}，{invitation}。" for shop in SHOPS for invitation in INVITATIONS)

SAMPLE_STYLE = Style("热情", "诗意", "掌柜", SIGNATURES[0])


def goods(rng: random.Random) -> Goods:
    category = rng.choice(CATEGORIES)
    tables = {
        "颜色": COLOURS,
        "材质": category.materials,
        "图案": PATTERNS,
        "风格": MANNERS,
        "场合": OCCASIONS,
        "特点": category.features,
    }
    keys = rng.sample(list(tables), rng.choice((2, 3, 3, 4, 4, 5)))
    attributes = []
    for key in keys:
        value = rng.choice(list(tables[key]))
        attributes.append((key, value, tables[key][value]))
    return Goods(rng.choice(category.items), tuple(attributes))


def describe(article: Goods, style: Style, rng: random.Random) -> str:
    body = VOICES[style.body]
    parts = [rng.choice(VOICES[style.opening].openings).format(item=article.item)]
    for key, value, words in article.attributes:
        sentence = rng.choice(body.sentences[key])
        parts.append(sentence.format(value=value, word=words[body.tone]))
    parts.append(rng.choice(VOICES[style.closing].closings))
    parts.append(style.signature)
    return "".join(parts)
